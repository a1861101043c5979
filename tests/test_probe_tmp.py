import time, json, cProfile, pstats
from fake_grid import FakeGrid
from lalora_app import server_app
import pytest
@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(server_app, "_POLL", 0.0); monkeypatch.setattr(server_app, "_SETTLE", 0.0)
@pytest.mark.parametrize("m", ["la-lora","dp-lora"])
def test_x(tiny, m, tmp_path):
    t=time.time()
    c = tiny(method=m, **{"data.dirichlet-alpha": float("inf"), "privacy.epsilon": float("inf"), "num-server-rounds":3})
    g = FakeGrid(c, 3)
    p = cProfile.Profile(); p.enable()
    server_app.run(g, c)
    p.disable()
    print("SEC", time.time()-t)
    pstats.Stats(p).sort_stats("tottime").print_stats(12)
    pstats.Stats(p).sort_stats("cumtime").print_stats(40)
