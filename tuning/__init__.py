"""Sweeps: many trainings that look for good hyper-parameters, shared by any number of workers."""
