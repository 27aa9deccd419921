# SPDX-License-Identifier: Apache-2.0
"""Structural twins of models that no package index ships, written independently: names, arguments, token
layouts and order of operations of the originals, on tiny layers."""
