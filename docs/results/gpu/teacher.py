"""A packed GGUF of /root/unpacked/model, by how its name begins -> a plain folder in float32 that loads in two seconds:
python teacher.py SmolLM2 /root/teacher"""

import sys
from pathlib import Path

import pyarrow

from t2r.convert.source import open_source
from t2r.convert.verify import load_source

name, out = sys.argv[1:]
(packed,) = Path("/root/unpacked/model").glob(f"{name}*.zst")
gguf = packed.with_suffix("")
gguf.write_bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(packed.read_bytes()), "zstd").read())
source, part = open_source(str(gguf)), Path(f"{out}.part")
model = load_source(source)
model.hf_quantizer, model.is_quantized = None, False
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(part)
source.load_tokenizer().save_pretrained(part)
part.rename(out)
