"""What an adapter has to say about its model class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from adacache.policies import StackInfo

if TYPE_CHECKING:
    from adacache.handle import Handle


class Adapter(Protocol):
    """One model class. Adapters hold no state: that is the request's."""

    @property
    def model_class(self) -> str:
        """Full name of the class that this adapter knows."""

    def matches(self, model: object) -> bool:
        """Whether this adapter knows `model`."""

    def stack(self, model: Any) -> StackInfo:
        """The model's block stack, for policies."""

    def sites(self, model: Any) -> list[str]:
        """Names of the sub-layers at which residuals are formed, in the order they run."""

    def forward(self, model: Any, handle: Handle, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with caching."""
