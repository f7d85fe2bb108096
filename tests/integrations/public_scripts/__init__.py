"""Small scripts in the patterns of public training scripts for DeepSpeed.

`tests.integrations.test_public_scripts` runs each of them with DeepSpeed and with onecycle.
"""
