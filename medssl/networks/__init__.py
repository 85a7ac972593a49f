"""Networks: how they are built, their noise, and Monte Carlo sampling."""
