"""What a head does with its sink. How it finds it: QK detectors and no-op circuits."""
