"""The packed GGUF in /root/unpacked/model -> /root/teacher, a plain folder in float32 that loads in two seconds."""

from pathlib import Path

import pyarrow

from t2r.convert.source import open_source
from t2r.convert.verify import load_source

(packed,) = Path("/root/unpacked/model").glob("*.zst")
gguf = packed.with_suffix("")
gguf.write_bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(packed.read_bytes()), "zstd").read())
source, part = open_source(str(gguf)), Path("/root/teacher.part")
model = load_source(source)
model.hf_quantizer, model.is_quantized = None, False
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(part)
source.load_tokenizer().save_pretrained(part)
part.rename("/root/teacher")
