"""What a run is: frozen models, presets, strict YAML, cross-checks. Owns no torch and no megatron."""
