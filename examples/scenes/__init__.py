"""Two small video models of diffusers classes, trained on drawn scenes; see README.md."""
