"""From labels to a student that is its own teacher: train, label, judge, deliver."""
