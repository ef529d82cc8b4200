# ruff: noqa
from sparsereg.penalties import TemperatureScheduler, update_temperatures

scheduler = TemperatureScheduler(initial_temp=1.0, final_temp=0.1, anneal_epochs=50)

for epoch in range(100):
    temp = scheduler.get_temperature(epoch)
    update_temperatures(model, temp)
    # ... training loop ...
