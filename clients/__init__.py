"""The project's ClientApp: trains and evaluates a partition, misbehaves when told to."""
