"""What a person looks at afterwards: one self-contained HTML page."""
