"""megalemur: 3D-parallel training of Llama-class models on megatron-core, with proof before and after every step."""

__version__ = "0.1.0"
