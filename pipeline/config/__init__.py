"""What the user asked for: settings, presets and the reading of run files. No torch."""
