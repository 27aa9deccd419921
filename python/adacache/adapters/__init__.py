# SPDX-License-Identifier: Apache-2.0
"""Declarations of models: one file per family. A new file with a `ModelSpec` at its top level is found."""
