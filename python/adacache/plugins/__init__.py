# SPDX-License-Identifier: Apache-2.0
"""Plug-ins for inference frameworks, one file each. None of the frameworks is imported unless its file is."""
