# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the serving tests."""

from __future__ import annotations

from op_threads import one_thread

__all__ = ["one_thread"]
