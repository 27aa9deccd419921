# SPDX-License-Identifier: Apache-2.0
"""A mixin for the models of SGLang-Diffusion, as `TeaCacheMixin` is one.

    class WanTransformer3DModel(CachableDiT, AdaCacheMixin): ...

The denoising stage encloses the loop of a request:

    with transformer.adacache_request(policy, batch.num_inference_steps, videos=..., branches=...):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adacache.api import ATTRIBUTE, disable, enable
from adacache.handle import Handle
from adacache.policies import Named, Policy
from adacache.runtime.request import Request


class AdaCacheMixin:
    """Methods that a model gets. The state of a request is in the request, not in the model."""

    @contextmanager
    def adacache_request(
        self,
        policy: Policy | str | Path | None,
        num_inference_steps: int,
        *,
        videos: int = 1,
        branches: int = 1,
    ) -> Iterator[Request | None]:
        """Forward calls inside are those of one request; nothing is read from the device to count its steps.

        Args:
            policy: see `adacache.enable`; None: no caching.
            num_inference_steps: of the request.
            videos: in its batch.
            branches: forward calls per step: 2 with guidance in two calls, conditional first.

        Raises:
            ValueError: the settings do not fit the model or the steps.
        """
        if policy is None:
            self.disable_adacache()
            yield None
            return
        handle = self.adacache_handle
        settings = Named(policy, None, None) if isinstance(policy, str | Path) else policy
        if handle is not None and not handle.has_settings(settings, handle.num_steps, None):
            self.disable_adacache()
            handle = None
        if handle is None:
            handle = enable(self, policy, num_steps=num_inference_steps)
        handle.refresh(num_inference_steps)
        with handle.request(num_videos=videos, branches=branches) as request:
            yield request

    @property
    def adacache_handle(self) -> Handle | None:
        """The handle of the latest request, if caching is on; it has its `trace`."""
        found: Handle | None = self.__dict__.get(ATTRIBUTE)
        return found

    def disable_adacache(self) -> None:
        """Restores the model, if caching is on."""
        if self.adacache_handle is not None:
            disable(self)
