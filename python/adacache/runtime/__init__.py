# SPDX-License-Identifier: Apache-2.0
"""The runtime: one executor for all models and methods.

clock: which request, step and branch a call belongs to. request: one generation. store: kept tensors.
    meter: sums
of watched residuals. runner: executes a forward call by the plan of its step.
"""
