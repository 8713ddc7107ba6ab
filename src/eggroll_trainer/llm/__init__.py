"""Language models: training by a reward, adapters and exports."""
