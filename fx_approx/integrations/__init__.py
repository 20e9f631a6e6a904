"""Recipes in the training loops of others: one module for each, which imports it; nothing is imported from here."""
