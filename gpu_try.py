# ruff: noqa
import os
import sys
import time

import torch

t00=time.time()
root=os.getcwd()
for n in ("old","new"):
    p=f"/tmp/pkg-{n}/copernicus"; os.makedirs(p,exist_ok=True)
    for d in ("models","datasets","platform"):
        src=f"{root}/{d}" if n=="new" else f"{root}/.gpuold/{d}"
        if not os.path.lexists(f"{p}/{d}"): os.symlink(src,f"{p}/{d}")
    for f in os.listdir(f"{root}/platform/_package"):
        if not os.path.lexists(f"{p}/{f}") : os.symlink(f"{root}/platform/_package/{f}",f"{p}/{f}")
which=sys.argv[1]
sys.path.insert(0,f"/tmp/pkg-{which}")
from copernicus.datasets.sensors import SENSORS
from copernicus.models import create_model
from copernicus.models.masked_autoencoder import parameter_groups

dev=torch.device("cuda")
B=64
torch.manual_seed(0)
m=create_model("copernicus_fm_base_mae").to(dev)
x={n:torch.randn(B,s.channels,s.image_size,s.image_size,device=dev) for n,s in SENSORS.items()}
noise={n:torch.rand(B,(s.image_size//s.patch_kernel)**2,device=dev) for n,s in SENSORS.items()}
meta={n:torch.tensor([[10.,50.,18000.,s.token_area_km2]]*B,device=dev) for n,s in SENSORS.items()}
opt=torch.optim.AdamW(parameter_groups(m,.05),lr=1e-6,betas=(.9,.95),fused=True)
def fwd():
    with torch.autocast('cuda',torch.bfloat16): return m(x,SENSORS,meta,noise)['loss']
def step(ev=None):
    if ev: ev[0].record()
    loss=fwd()
    if ev: ev[1].record()
    opt.zero_grad(set_to_none=True); loss.backward()
    if ev: ev[2].record()
    opt.step()
    if ev: ev[3].record()
    return loss
def bench(name,n=12,warm=4):
    t=time.time()
    for _ in range(warm): l=step()
    torch.cuda.synchronize(); w=time.time()-t
    torch.cuda.reset_peak_memory_stats()
    evs=[[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in range(n)]
    t=time.time()
    for e in evs: l=step(e)
    cpu=time.time()-t
    torch.cuda.synchronize(); wall=time.time()-t
    parts=[sorted(e[i].elapsed_time(e[i+1]) for e in evs)[n//2] for i in range(3)]
    tot=sorted(e[0].elapsed_time(e[3]) for e in evs)[n//2]
    print(f"{which} {name}: step {tot:.1f} ms (fwd {parts[0]:.1f} bwd {parts[1]:.1f} opt {parts[2]:.1f}) wall {wall/n*1e3:.1f} cpu launch {cpu/n*1e3:.1f} mem {torch.cuda.max_memory_allocated()/1e9:.1f} GB loss {l.item():.6f} warm {w:.1f}s [{time.time()-t00:.0f}s]",flush=True)
    return tot
def prof(name,rows=28):
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA,ProfilerActivity.CPU]) as p:
        for _ in range(2): step()
        torch.cuda.synchronize()
    ks={}
    for e in p.events():
        if e.device_type==torch.autograd.DeviceType.CUDA:
            k=e.name[:95]; a=ks.setdefault(k,[0,0]); a[0]+=e.device_time if hasattr(e,'device_time') else e.cuda_time; a[1]+=1
    tot=sum(v[0] for v in ks.values())
    print(f"--- profile {which} {name}: {tot/2e3:.1f} ms a step of kernels")
    for k,v in sorted(ks.items(),key=lambda kv:-kv[1][0])[:rows]: print(f"{v[0]/2e3:8.2f} ms {v[1]//2:5d} {k}")
if which=="new":
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as fc: fwd().backward()
    opt.zero_grad(set_to_none=True)
    F=fc.get_total_flops(); print(f"flops a step {F/1e12:.2f} T")
    pass
    def cpuprof(name):
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CPU]) as p:
            for _ in range(2): step()
            torch.cuda.synchronize()
        ev=sorted(p.key_averages(),key=lambda e:-e.self_cpu_time_total)
        print("--- cpu",name,f"{sum(e.self_cpu_time_total for e in ev)/2e3:.1f} ms")
        for e in ev[:25]: print(f"{e.self_cpu_time_total/2e3:8.2f} ms {e.count//2:5d} {e.key[:80]}")
    import copernicus.models.attention as A, copernicus.models.masked_autoencoder as MA, copernicus.models.vit as V
    from copernicus.models.attention import pack, unpack, packing, Packing
    import torch.nn.functional as Fn
    def attend2(qkv, H, packed):
        q,k,v=qkv.unflatten(1,(3,H,-1)).unbind(1)
        sizes=[r*t for r,t in packed.groups]; out=[]
        for (r,t),a,b,c in zip(packed.groups,q.split(sizes),k.split(sizes),v.split(sizes)):
            a,b,c=(x.unflatten(0,(r,t)).transpose(1,2) for x in (a,b,c))
            out.append(Fn.scaled_dot_product_attention(a,b,c).transpose(1,2).flatten(2).flatten(0,1))
        return torch.cat(out)
    def stack(blocks):
        def run(z, packed):
            for b in blocks: z=b(z,packed)
            return z
        return run
    orig=MA.run_blocks
    def with_stacks(mode):
        import torch._dynamo; torch._dynamo.reset()
        kw=dict(dynamic=False) | ({"mode":mode} if mode else {})
        comp={id(m.blocks):torch.compile(stack(m.blocks),**kw), id(m.decoder_blocks):torch.compile(stack(m.decoder_blocks),**kw)}
        def rb(blocks,sequences,recompute=False,after=None):
            packed=packing(tuple((s.shape[0],s.shape[1]) for s in sequences),sequences[0].device)
            return unpack(comp[id(blocks)](pack(sequences),packed),sequences)
        MA.run_blocks=rb
    def zero_first_step(ev=None):
        opt.zero_grad(set_to_none=True); torch.compiler.cudagraph_mark_step_begin()
        if ev: ev[0].record()
        loss=fwd()
        if ev: ev[1].record()
        loss.backward()
        if ev: ev[2].record()
        opt.step()
        if ev: ev[3].record()
        return loss.detach().clone()
    step=zero_first_step
    variant=sys.argv[2]
    if variant=="groups2":
        V.attend=attend2; m.compile_blocks(); t=bench("block compile, groups2"); print("MFU",F/t/1e9/989); prof("groups2",30)
    if variant=="stack":
        with_stacks(None); t=bench("stack compile varlen"); print("MFU",F/t/1e9/989)
    if variant=="graphs":
        with_stacks("reduce-overhead"); t=bench("stack graphs varlen",warm=6); print("MFU",F/t/1e9/989); prof("graphs",30); cpuprof("graphs")
    if variant=="graphs2":
        V.attend=attend2; with_stacks("reduce-overhead"); t=bench("stack graphs groups2",warm=6); print("MFU",F/t/1e9/989); prof("graphs2",30)
else:
    bench("eager",n=6,warm=3); prof("eager",15)
