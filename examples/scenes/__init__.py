# SPDX-License-Identifier: Apache-2.0
"""Two small video models of diffusers classes, trained on drawn scenes; see README.md."""
