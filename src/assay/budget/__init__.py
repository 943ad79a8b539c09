"""Budgets, menus, plans and planners."""
