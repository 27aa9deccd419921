"""Networks and samplers in plain PyTorch that AdaCache is verified and demonstrated on."""
