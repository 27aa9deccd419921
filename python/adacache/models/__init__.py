# SPDX-License-Identifier: Apache-2.0
"""Networks and samplers in plain PyTorch that AdaCache is verified and demonstrated on."""
