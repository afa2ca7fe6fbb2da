"""What every program of the suite needs and no student has to read first."""
