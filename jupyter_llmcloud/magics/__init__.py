"""What users type in a notebook. A magic parses and composes; everything it does has a Python twin."""
