"""The endpoints, in one module for each resource."""
