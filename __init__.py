"""vlmc: compiles vision-language models for edge devices and measures what that gains."""

__version__ = "0.1.0"
