"""Every field of every config, once, with its unit and the reason for its value. Other configs start from this one.

  python -m anisora_jax.train --config configs/base.py --config.data.records=out/records --workdir out/run
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0  # of every random draw: parameters, order of clips, tasks, times, noise
  config.pretrained = ""  # folder of a Wan, AniSora or diffusers download, searched for weights that are "" below

  # Devices along each axis; they multiply to the count of devices, and one may be -1. Weights and what the optimiser
  # keeps of them are split over fsdp x clip x seq: it costs a gather of each layer.
  config.mesh = ConfigDict({
    "replica": 1, # copies of the weights over slow links: each sums its gradients first, then shares of sums are sent
    "data": 1,    # copies of the weights
    "fsdp": -1,   # batch split
    "clip": 1,    # frames of each clip split: for films too long for seq alone
    "seq": 1,     # tokens of each frame split: for clips too long for one device
    "tensor": 1,  # heads and MLP split: needs fast links, and heads that divide
  })
  config.model = ConfigDict({
    "size": "tiny",           # in anisora_jax/models/wan/sizes.py
    "weights": "",            # to start from: a file or folder of published weights, a run, or one of its checkpoints
    "expert": "",             # of two, as in Wan 2.2 A14B, which is trained: high_noise or low_noise
    "adapters": "",           # files folded into the weights first: "A", "A=0.8,B"; of one expert "low_noise:A=0.8"
    # Over clip and seq: ring, ring_both, ulysses, hybrid; full where both are 1, as all are there; local_global, which
    # sends between frames no more than a mask with a window shows.
    "attention": "ring",
    # Which frames a frame sees: all; causal: itself and earlier ones; window:24: so many to each side, also with
    # causal+ before it; window:24+globals:16: also so many that are spread evenly over the film.
    "mask": "all",
    "kernel": "dense",        # dense, or blockwise for long clips; splash on TPUs; cudnn on NVIDIA GPUs in bfloat16
    "remat": "attention",     # what a layer keeps for its backward pass: none, attention, matmuls, full; on the host:
                              # attention_offload, full_offload (its input), offload (both)
    "gate": 0.5,              # what gates start from when trained from scratch; 0 as Wan, which moves later
    "dtype": "float32",       # of arithmetic, bfloat16 on accelerators; parameters are always float32
  })
  config.lora = ConfigDict({  # trains low-rank adapters beside model.weights, which stay as they are
    "rank": 0,                # of the adapters; 0 trains the network itself
    "alpha": 16.0,            # adapters count alpha / rank times
    "where": r"blocks/(\w+_attention/[qkvo]|mlp/(up|down))/",  # regular expression on the paths of kernels
  })
  config.codec = ConfigDict({
    "name": "pixels",         # pixels moved into channels, no weights; wan21 or wan22: the VAEs of Wan
    "spatial": 2,             # of pixels: pixels a side of a latent cell
    "temporal": 1,            # of pixels: pixel frames of a latent frame
    "scale": 1.0,             # of pixels: latents are pixels times this; above 1 the network speaks more of pictures
    "weights": "",            # of a VAE, as are the rest: a file, or a folder of diffusers
    "dtype": "float32",       # of its arithmetic
    "chunked": True,          # a latent frame at a time: memory that does not grow with the clip, the same result
    "tile": 0,                # pixels a side of tiles, worked one by one and blended, which bounds memory; 0 for none
    "overlap": 0,             # pixels by which tiles overlap
  })
  config.text = ConfigDict({  # text encoder
    "name": "words",          # a fixed random vector a word, no weights; umt5_xxl: that of Wan
    "weights": "",            # of umt5_xxl: a file, or a folder of transformers
    "tokenizer": "",          # its tokenizer.json, or the folder that holds it
    "dtype": "bfloat16",      # of its weights and arithmetic
  })
  config.image = ConfigDict({ # image encoder, for sizes that read image tokens (Wan 2.1 image-to-video)
    "name": "clip_vit_h",
    "weights": "",            # a file, or a folder of transformers
    "dtype": "float32",       # of its weights and arithmetic
  })
  config.data = ConfigDict({
    "records": "",            # folders written by data/pack.py or encode, or tfds:NAME: "A" or "A=0.7,tfds:B=0.3"
    "encoded": False,         # records hold latents, written by encode with this config, and not clips
    "views": 4,               # masks under which encode looks at each clip; training draws one of them each time
    "buckets": "9x32x48@16",  # FRAMESxHEIGHTxWIDTH@CLIPS/DEVICES:WEIGHT, with commas; README, "A mesh is six numbers"
    "tokens": 0,              # of a batch, at most, for buckets without @: the largest that the mesh divides
    "assign": "any",          # any: buckets draw from all records by weight; fit: each record has one, and comes once
    "packed": 0,              # of latents: clips of up to a bucket's length that share its rows, at most; 0: none do
    "fps": 12.0,              # frames/s that clips are paced to; most animation is drawn at 8 to 12
    "threads": 2,             # readers of a host; decoding leaves Python's lock
  })
  config.tasks = ConfigDict({  # how often each is drawn; the weights need not add to 1. The mix follows AniSora's uses.
    "none": 0.05,             # text alone
    "first": 0.25,            # image to video
    "last": 0.03,
    "first_last": 0.2,        # in-betweening
    "loop": 0.02,             # the same mask; one image at both ends when sampling
    "keyframes": 0.15,        # one to five frames anywhere
    "every_nth": 0.05,        # repair between good frames
    "continuation": 0.1,      # the first frames, two to half of the clip
    "box": 0.05,              # regions, kept or regenerated, with the first frame
    "blob": 0.03,
    "character": 0.07,        # the tracked character, where records have one
  })
  config.times = ConfigDict({
    "per_frame": 0.2,         # probability that frames of a sample draw their own noise time (PTSS); 1 to adapt a model
    "late_per_frame": 0.5,    # the same, from `late_from` on
    "late_from": 0.75,        # share of the steps
    "law": "uniform",         # uniform or logit_normal, before the shift
    "shift": 1.0,             # toward noise; Wan: 3 at 480p, 5 at 720p; small pixels need none
    "given": 0.0,             # share of their noise time that frames given whole have: 0 clean; 1 as Wan trained
    "low": 0.0,               # noise times are drawn from here ...
    "high": 1.0,              # ... to here: an expert learns only the times it is asked at
    "pattern": "independent", # how frames draw apart: independent, blocks, monotone, rolling
    "block": 1,               # latent frames that share a time in the pattern "blocks"
  })
  config.loss = ConfigDict({
    "weight": "none",         # of a noise time: none, or Wan's bell
    "drop_text": 0.1,         # probability of training a sample without its caption, for guidance
    "drop_condition": 0.05,   # ... with nothing given
  })
  config.optimizer = ConfigDict({
    "rate": 1e-3,             # peak learning rate; 1e-5 to fine-tune a large model
    "warmup": 50,             # steps
    "schedule": "cosine",     # after the warm-up: constant, cosine, or wsd: constant, then linearly down
    "final": 0.05,            # share of the peak where cosine and wsd end
    "cooldown": 0.2,          # last share of the steps, in which wsd goes down
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "decay": 1e-4,            # of kernels only
    "clip": 1.0,              # largest global norm of the gradients
    "frozen": "",             # regular expression on parameter paths that are not trained; "" for none
    "ema": 0.9999,            # limit of the average's decay; it starts at 0.1 and rises as (1 + n) / (10 + n)
    "offload": False,         # moments and the average live in the host's memory, and visit the device once a step
  })
  config.train = ConfigDict({
    "steps": 1000,
    "micro_batches": 1,       # parts of a batch, worked one after the other to save memory; the result is the same
    "report": 10,             # steps between reports
    "held_out": 200,          # steps between held-out losses, 0 for never
    "held_out_batches": 2,    # batches of held-out clips in one such loss
    "checkpoint": 200,        # steps between checkpoints, 0 for only the last
    "keep": 3,                # checkpoints kept
  })
  config.sample = ConfigDict({
    "solver": "euler",        # euler, heun (two network calls a step), unipc
    "steps": 20,
    "shift": 1.0,             # toward noise, as times.shift
    "start": 1.0,             # noise time of the first step, before the shift; Wan's UniPC: 0.999
    "end": 0.0,               # noise time of the last step's end, before the shift; diffusers' UniPC: 0.001, then 0
    "whole": False,           # tell the network whole thousandths, rounded down, as Wan's UniPC does
    "multiplier": 0.0,        # noise left on given frames: 0 keeps them, 0.2 lets them live (Pusa), 1: see times.given
    "guidance": 1.0,          # of the caption; 1 is a single pass
    "guidance_low": -1.0,     # the same for the second of two experts; -1 for guidance
    "negative": "",           # caption to be guided away from
    "area": 0,                # pixels of a film that takes its shape from its first picture; 0: as in training
    "area_rule": "i2v",       # how: i2v (Wan 2.1, AniSora) or ti2v (Wan 2.2 TI2V-5B)
    "boundary": 0.0,          # noise time from which on, upward, the first of two experts is asked; 0 for one network
  })
  return config
