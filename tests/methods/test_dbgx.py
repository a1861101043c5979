import torch
from lalora_app.adapter.factors import active_names
from lalora_app.data.examples import split
from lalora_app.models.backbone import build
def test_x(tiny):
    config=tiny(method="head-only", **{"model.checkpointing": True})
    model, start = build(config)
    model.load(start)
    model.engine.activate(active_names(start, frozenset()))
    out=open("/tmp/dbgx.txt","w")
    out.write(str([n for n,p in model.model.named_parameters() if p.requires_grad])+"\n")
    def hook(n):
        def f(mod,i,o):
            t=o if torch.is_tensor(o) else (o[0] if isinstance(o,tuple) else None)
            out.write(f"{n} {type(mod).__name__} {getattr(t,'requires_grad',None)}\n")
        return f
    for n,m in list(model.model.named_modules()):
        m.register_forward_hook(hook(n))
    out.write(str([ (n,len(m._forward_hooks)) for n,m in model.model.named_modules() if len(m._forward_hooks)>1])+"\n")
    encoded = model.encode(split(config.data)[0])
    model.losses(encoded.batch(range(4)))
    out.close()
