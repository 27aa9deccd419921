# SPDX-License-Identifier: Apache-2.0
"""Caching inside other libraries' pipelines."""
