"""Mistakes in the arithmetic: models, adapters, operators, quantisation, and what a training step makes of them."""

from tests.planted.bug import Bug

MODELS, ADAPTERS, OPS, TRAINING = (f"src/rwkv_bone/{part}" for part in ("models", "adapters", "ops", "training"))
STEP = f"{OPS}/regions"
QUANTIZATION = "src/rwkv_bone/quantization.py"
MODEL_TESTS, LAYER_TESTS = "tests/models/test_models.py", "tests/adapters/test_adapter_layers.py"
FORMATS, OPTIMIZER = "tests/ops/test_number_formats.py", "tests/training/test_optimizer.py"
ORACLE = f"{MODEL_TESTS} -k several_heads"
TWINS, TIME_MIX = "tests/ops/test_regions.py", "tests/ops/test_time_mix.py"
KEPT_INPUTS = "tests/models/test_kept_inputs.py"
PAGES, QUANTISED = "tests/checkpoints/test_pages.py", "tests/test_quantization.py"
THOUSANDS = f"{LAYER_TESTS} -k thousands"
REGIONS, ROWS, SIMD = "cuda/cpu/regions.cpp", "cuda/cpu/regions_rows.h", "cuda/cpu/simd.h"
NATIVE = "tests/ops/test_regions_native.py"
CROSS_ENTROPY, LINEAR = "tests/ops/test_cross_entropy.py", "tests/ops/test_linear.py"
ZERO, START = "tests/training/test_light_zero.py", "tests/training/test_start.py"

BUGS = (
    # Rows of a long batch that are left out, or counted twice.
    Bug(
        f"{ADAPTERS}/blockwise.py",
        "(slice(start, start + step) for start",
        "(slice(start + (start > 0), start + step) for start",
        THOUSANDS,
    ),
    Bug(
        f"{ADAPTERS}/blockwise.py", "total += a[rows].t() @ b[rows]", "total = a[rows].t() @ b[rows].float()", THOUSANDS
    ),
    Bug(
        f"{ADAPTERS}/blockwise.py",
        "a.shape[1] > b.shape[1] else b, 8)",
        "a.shape[1] > b.shape[1] else b, 1)",
        THOUSANDS,
    ),
    Bug(f"{ADAPTERS}/lora.py", "[b, b - b0]", "[b, b0 - b]", f"{LAYER_TESTS} -k 'dense or merged'"),
    Bug(
        f"{ADAPTERS}/bat.py",
        "grad_bone += grad_z.transpose(1, 2) @",
        "grad_bone = grad_z.transpose(1, 2) @",
        THOUSANDS,
    ),
    Bug(
        f"{ADAPTERS}/blockwise.py",
        "for start in range(0, rows, step))",
        "for start in range(0, rows // step * step, step))",
        THOUSANDS,
    ),
    Bug(f"{ADAPTERS}/bat_col.py", "stop = min(start + step, count)", "stop = min(start + step, count - 1)", THOUSANDS),
    # The decay in bf16.
    Bug(
        f"{STEP}/twins.py",
        "w = widened(w0, pw) + pw",
        "w = widened(w0.to(pw.dtype) + pw)",
        "tests/ops/test_regions.py -k decays_bias",
    ),
    Bug(
        f"{STEP}/time_mix6.py",
        "w = widened(p.decay, x.r)",
        "w = widened(p.decay.to(x.r.dtype), x.r)",
        f"{MODEL_TESTS} -k decay",
    ),
    Bug(
        f"{STEP}/time_mix6.py",
        "w = w + widened(x.w @ p.decay_w2.to(x.w.dtype))",
        "w = (w + widened(x.w @ p.decay_w2.to(x.w.dtype))).to(x.r.dtype).float()",
        f"{MODEL_TESTS} -k decay",
    ),
    Bug(f"{OPS}/wkv.py", "w0 = w0.to(wide)", "w0 = w0.to(r.dtype).to(wide)", "tests/ops/test_wkv7.py -k constant_part"),
    # What is trained, how fast, and what decays.
    Bug(
        f"{TRAINING}/prepare.py",
        "parameter.requires_grad_(name not in unused)",
        "parameter.requires_grad_(True)",
        "tests/training/test_module.py",
    ),
    Bug(f"{MODELS}/v7.py", '("v0", "v1", "v2") if layer == 0', "() if layer == 0", "tests/training/test_module.py"),
    Bug(
        f"{ADAPTERS}/inject.py",
        "if param_part(key) == part} - unused",
        "if param_part(key) == part}",
        "tests/training/test_module.py",
    ),
    Bug(
        f"{MODELS}/v6.py",
        'return 2.0 if key.endswith(".time_decay") else 1.0',
        'return 2.0 if key.endswith(".time_decay") else 3.0 if key.endswith("time_faaaa") else 1.0',
        OPTIMIZER,
    ),
    Bug(f"{MODELS}/v6.py", 'key.endswith(".time_decay")', '".time_decay" in key', OPTIMIZER),
    Bug(f"{MODELS}/v7.py", 'key.endswith(".att.w0")', 'key.endswith((".att.w0", ".att.a0"))', OPTIMIZER),
    Bug(f"{TRAINING}/optimizer.py", '"emb", "head", "state")', '"emb", "state")', OPTIMIZER),
    Bug(f"{TRAINING}/optimizer.py", '("projection", "emb", "head", "state")', '("projection", "time")', OPTIMIZER),
    Bug(f"{TRAINING}/optimizer.py", 'name.endswith(".lora_B")', '".lora_" in name', OPTIMIZER),
    Bug(
        f"{TRAINING}/schedule.py",
        "(step - peak) / max(total_steps - 1 - peak, 1)",
        "(step - peak) / max(total_steps - peak, 1)",
        "tests/training/test_schedule.py",
    ),
    Bug(
        f"{TRAINING}/schedule.py",
        "config.lr_init * (step + 1) / config.warmup_steps",
        "config.lr_init * step / config.warmup_steps",
        "tests/training/test_schedule.py",
    ),
    Bug(
        f"{TRAINING}/module.py",
        "return loss * (scale + 0",
        "return loss * (scale * self.plan.accumulate + 0",
        "tests/training/test_module.py",
    ),
    Bug(
        f"{TRAINING}/module.py",
        "loss_scale=scale",
        "loss_scale=1.0",
        "tests/training/test_module.py",
    ),
    Bug(
        f"{TRAINING}/module.py",
        "self.plan.world_size / self._units",
        "1 / self._units",
        "tests/training/test_module.py",
    ),
    Bug(
        f"{TRAINING}/gather.py",
        'parameter.detach().to("cpu", copy=True)',
        'parameter.detach().to("cpu")',
        "tests/training/test_module.py",
    ),
    # The loss.
    Bug(f"{OPS}/cross_entropy.py", "beta=0, alpha=loss_scale)", "beta=0).mul_(loss_scale)", CROSS_ENTROPY),
    Bug(
        f"{OPS}/cross_entropy.py",
        "logits, matrix, beta=0, alpha=loss_scale)",
        "logits.mul_(loss_scale), matrix, beta=0)",
        CROSS_ENTROPY,
    ),
    Bug(f"{OPS}/cross_entropy.py", "largest * l2wrap", "largest.sign() * l2wrap", CROSS_ENTROPY),
    Bug(
        f"{OPS}/cross_entropy.py",
        "softmax = (block - largest).exp_()",
        "softmax = (block - largest.to(block.dtype)).exp_()",
        CROSS_ENTROPY,
    ),
    Bug(
        f"{OPS}/cross_entropy.py",
        "hidden, weight = hidden.detach(), weight.detach()",
        "pass",
        f"{CROSS_ENTROPY} -k evaluating",
    ),
    Bug(
        "cuda/cpu/cross_entropy_rows.h",
        "(largest - aimed) + float(std::log(total))",
        "float(std::log(total) + double(largest)) - aimed",
        f"{CROSS_ENTROPY} -k any_size",
    ),
    Bug(
        "cuda/cpu/cross_entropy_rows.h",
        "line[first] != largest) first++;",
        "line[V - 1 - first] != largest) first++;\n    if (p.l2wrap != 0) first = V - 1 - first;",
        f"{CROSS_ENTROPY} -k largest_logits",
    ),
    Bug("cuda/cpu/cross_entropy_rows.h", "most = x > most ? x : most;", "most = x;", f"{CROSS_ENTROPY} -k any_size"),
    Bug(
        "cuda/cpu/cross_entropy_rows.h",
        "for (int64_t i = V; i < size; i++) line[i] = -INFINITY;",
        "for (int64_t i = V; i < size; i++) line[i] = 0.0f;",
        f"{CROSS_ENTROPY} -k each_row",
    ),
    Bug(
        "cuda/cpu/cross_entropy_rows.h",
        "if (!p.gradient) return;",
        "",
        f"{CROSS_ENTROPY} -k each_row",
    ),
    Bug("cuda/cpu/cross_entropy.cpp", "return BAD_TARGET;", "return OK;", f"{CROSS_ENTROPY} -k outside"),
    # The product of one row.
    Bug("cuda/cpu/products.h", "bits & ~0xffff", "bits", LINEAR),
    Bug("cuda/cpu/products.h", "row[i] * x[i];", "row[i];", LINEAR),
    Bug("cuda/cpu/products.h", "read_row(BFLOAT16, row + i, 0, n - i, tail);", "", LINEAR),
    Bug("cuda/cpu/products.h", "(sums[0] + sums[1]) + (sums[2] + sums[3])", "(sums[0] + sums[1]) + sums[2]", LINEAR),
    Bug("cuda/cpu/gemv.cpp", "begin + BLOCK < m ? begin + BLOCK : m", "begin + BLOCK - 1", LINEAR),
    Bug(f"{OPS}/linear.py", "not torch.is_grad_enabled() and", "", LINEAR),
    Bug(f"{OPS}/linear.py", " or not weight.is_contiguous()", "", LINEAR),
    Bug(f"{MODELS}/layers.py", "logits.amax(dim=1).square().sum()", "logits.amax().square()", CROSS_ENTROPY),
    # Adapters.
    Bug(
        f"{ADAPTERS}/settings.py",
        "(self.alpha or self.r) / (math.sqrt(self.r) if self.rslora else self.r)",
        "(self.alpha or (1 if self.rslora else self.r)) / (math.sqrt(self.r) if self.rslora else self.r)",
        f"{LAYER_TESTS} -k scale_of_lora",
    ),
    Bug(
        f"{ADAPTERS}/settings.py",
        "(self.alpha or self.r) / (math.sqrt(self.r) if self.rslora else self.r)",
        "self.alpha / math.sqrt(self.r) if self.rslora else (self.alpha or self.r) / self.r",
        f"{LAYER_TESTS} -k scale_of_lora",
    ),
    Bug(f"{ADAPTERS}/lora.py", "    torch.set_num_threads(1)\n", "", f"{LAYER_TESTS} -k threads"),
    Bug(f"{ADAPTERS}/lora.py", "inner[:, :r] + inner[:, r:]", "inner[:, :r]", f"{LAYER_TESTS} -k thousands"),
    Bug(
        f"{ADAPTERS}/lora.py",
        "F.dropout(x, dropout), settings",
        "F.dropout(x, dropout) * (1 - dropout), settings",
        f"{LAYER_TESTS} -k dropout",
    ),
    Bug(
        f"{ADAPTERS}/lora.py",
        "[(a - a0).to(dtype), a0.to(dtype)]",
        "[(a - a0).to(dtype), a.to(dtype)]",
        f"{LAYER_TESTS} -k dense",
    ),
    Bug(f"{ADAPTERS}/blockwise.py", "total[:, : x.shape[1] - full] += x[:, full:]", "pass", f"{LAYER_TESTS} -k dense"),
    Bug(
        f"{ADAPTERS}/layer.py", "grad_bias = g.sum(dim=0)", "grad_bias = g.mean(dim=0)", f"{LAYER_TESTS} -k backward_is"
    ),
    Bug(
        f"{ADAPTERS}/bat_col.py",
        'BatColFunction.apply(x, base, getattr(base, "bias", None), tensors["bone"])',
        'BatColFunction.apply(x, base, None, tensors["bone"])',
        "tests/hf/test_bone_model.py -k bitsandbytes",
    ),
    # Quantisation.
    Bug(
        QUANTIZATION,
        "blocks_in_units[-1] = blocks[-1] / largest[-1]",
        "pass",
        "tests/test_quantization.py -k last_block",
    ),
    Bug(QUANTIZATION, "if size % BLOCK:", "if False:", "tests/test_quantization.py -k last_block"),
    Bug(
        QUANTIZATION,
        "largest[-1:].clamp_(min=SMALLEST)",
        "pass",
        "tests/test_quantization.py -k 'nearest or bit_for_bit'",
    ),
    Bug(
        QUANTIZATION,
        "scales[rows] = largest / torch.full_like(largest, 127.0)",
        "scales[rows] = largest / 128",
        "tests/test_quantization.py",
    ),
    Bug(
        QUANTIZATION,
        "nibbles[::2] << 4 | nibbles[1::2]",
        "nibbles[1::2] << 4 | nibbles[::2]",
        "tests/test_quantization.py",
    ),
    Bug(QUANTIZATION, "if self.scales.dtype != torch.float32:", "if False:", "tests/test_quantization.py"),
    # New weights.
    Bug(f"{MODELS}/v7.py", "att.k_a.fill_(1.02)", "att.k_a.fill_(1.0)", f"{MODEL_TESTS} -k scratch"),
    Bug(f"{MODELS}/v7.py", "0.73 - linear * 0.4", "0.73 + linear * 0.4", f"{MODEL_TESTS} -k scratch"),
    Bug(f"{MODELS}/v7.py", "(late**4)", "(late * 4)", f"{MODEL_TESTS} -k scratch"),
    Bug(f"{MODELS}/v7.py", "((1 + layer) / n_layer) ** 0.7", "(layer / n_layer) ** 0.7", f"{MODEL_TESTS} -k scratch"),
    Bug(
        f"{MODELS}/load.py",
        "max(arch.vocab_size / arch.n_embd, 1)",
        "arch.vocab_size / arch.n_embd / 2",
        f"{MODEL_TESTS} -k scratch",
    ),
    # Models.
    Bug(f"{MODELS}/rwkv.py", "or (rows < sequences and not packed)", "", f"{MODEL_TESTS} -k fewer_rows"),
    Bug(f"{MODELS}/rwkv.py", "if part.shape != shape:", "if False:", f"{MODEL_TESTS} -k fewer_rows"),
    Bug(f"{STEP}/twins.py", "(removal * rate).to(dtype)", "removal.to(dtype)", TWINS),
    Bug(
        f"{MODELS}/v5.py",
        "1 - widened(self.time_mix_r, x))",
        "widened(self.time_mix_r, x))",
        ORACLE,
    ),
    Bug(
        f"{MODELS}/v5.py",
        "(1 - widened(self.time_mix_k, x), ",
        "(1 - self.time_mix_k.to(x.dtype), ",
        "tests/models/test_rounding.py -k share",
    ),
    # The step between the projections.
    Bug(
        f"{STEP}/twins.py",
        "return g.index_fill(1, starts, 0).roll(-1, dims=1), first",
        "return g.roll(-1, dims=1), first",
        TWINS,
    ),
    Bug(f"{STEP}/twins.py", "widened(dk) + dk_bonus,", "widened(dk),", TWINS),
    Bug(f"{STEP}/twins.py", "* (length >= SHORTEST)", "", f"{TWINS} -k zeros"),
    Bug(f"{STEP}/twins.py", "dv0 = dv - dv_first", "dv0 = dv", TWINS),
    Bug(f"{STEP}/twins.py", "share * (1 + g * (1 - share))", "share * (1 + g)", f"{TWINS} -k gated"),
    Bug(f"{STEP}/time_mix7.py", "r=dr.flatten(-2) + dr_bonus", "r=dr.flatten(-2)", TIME_MIX),
    Bug(
        f"{STEP}/time_mix7.py",
        "v_first=None if x.v_first is None else dv_first",
        "v_first=None if x.v_first is None else torch.zeros_like(dv_first)",
        TIME_MIX,
    ),
    Bug(
        f"{STEP}/time_mix7.py",
        "want = need.r_k or need.ln_weight or need.ln_bias",
        "want = need.r_k and need.ln_weight and not need.ln_bias",
        TIME_MIX,
    ),
    Bug(
        f"{STEP}/time_mix7.py",
        'y, _, saved = recurrence.forward("wkv7", inputs, state,',
        'y, _, saved = recurrence.forward("wkv7", inputs, None,',
        TIME_MIX,
    ),
    Bug(f"{STEP}/time_mix7.py", "keep = keep_wkv and torch.is_grad_enabled()", "keep = True", TIME_MIX),
    Bug(
        f"{STEP}/time_mix6.py",
        "y, _, saved = recurrence.forward(operator, inputs, state,",
        "y, _, saved = recurrence.forward(operator, inputs, None,",
        TIME_MIX,
    ),
    Bug(f"{STEP}/mix.py", "stacked([share], x))[0]", "stacked([shares[0]], x))[0]", KEPT_INPUTS),
    Bug(f"{STEP}/mix.py", "w2[m : m + 1], x)", "w2[:1], x)", KEPT_INPUTS),
    Bug(f"{STEP}/rebuild.py", "table.clear()", "pass", KEPT_INPUTS),
    Bug(f"{STEP}/rebuild.py", "outer_pack(source.detach())", "source.detach()", KEPT_INPUTS),
    Bug(f"{MODELS}/layers.py", "return trained or getattr", "return getattr", KEPT_INPUTS),
    Bug(f"{MODELS}/rwkv.py", "cu_seqlens, not recompute.wkv)", "cu_seqlens)", "tests/test_saved_page.py"),
    Bug(f"{MODELS}/v6.py", 'MIXED = "wkvrg"', 'MIXED = "wkvg"', ORACLE),
    Bug(
        f"{MODELS}/v6.py",
        "(self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)  #",
        "(self.time_maa_w, self.time_maa_k, self.time_maa_r, self.time_maa_v, self.time_maa_g)  #",
        ORACLE,
    ),
    Bug(
        f"{STEP}/twins.py",
        "index_copy_(1, starts, with_zeros(last.to(x.dtype), len(starts))[None])",
        "index_fill_(1, starts, 0)",
        "tests/models/test_packed_rows.py",
    ),
    Bug(
        f"{MODELS}/layers.py",
        "expand(sequences - carried, -1, -1, -1)",
        "expand(sequences - carried, -1, -1, -1) * 0",
        "tests/models/test_packed_rows.py",
    ),
    Bug(
        f"{STEP}/twins.py",
        ").rsqrt()\n    return centred * scale, scale",
        ").rsqrt().bfloat16().float()\n    return centred * scale, scale",
        "tests/ops/test_norms.py",
    ),
    # Mapped files and quantised weights.
    Bug("src/rwkv_bone/checkpoints/pages.py", "(bits & OF_FILE != 0)", "(bits == bits)", f"{PAGES} -k never_lost"),
    Bug("src/rwkv_bone/checkpoints/pages.py", "(bits & OF_FILE != 0)", "(bits == bits)", f"{PAGES} -k ordinary"),
    Bug("src/rwkv_bone/checkpoints/numbers.py", "        give_back(tensor)\n", "", f"{PAGES} -k was_checked"),
    Bug(
        "src/rwkv_bone/models/load.py", "            checkpoints.give_back(tensor)\n", "", f"{PAGES} -k quantised_base"
    ),
    Bug("cuda/cpu/quantize_blocks.h", "x[i] /= scale", "x[i] *= 1.0f / scale", f"{QUANTISED} -k cut_short"),
    Bug("cuda/cpu/quantize_blocks.h", "!(p.bounds[b] >= x[i])", "p.bounds[b] <= x[i]", f"{QUANTISED} -k cpp_kernel"),
    Bug(
        "src/rwkv_bone/allocator.py", "> self._least + SLACK", "< self._least", "tests/test_allocator.py -k looked_for"
    ),
    Bug("src/rwkv_bone/allocator.py", "name.startswith(SETTINGS)", "False", "tests/test_allocator.py -k user_has_set"),
    # Operators and kernels.
    Bug(f"{OPS}/chunked.py", ".flip(3) - at_read", ".flip(3)", "tests/ops/test_wkv7.py -k 'chunked_form'"),
    Bug(
        f"{OPS}/chunks.py",
        "self.tokens // length + documents",
        "self.tokens // length + documents - 1",
        "tests/ops/test_packed.py",
    ),
    Bug("cuda/common.cuh", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16", "(bits + 0x8000) >> 16", FORMATS),
    Bug("cuda/common.cuh", "x != x ? 0x7fff :", "x != x && bits == 0 ? 0x7fff :", FORMATS),
    Bug("cuda/cpu/simd.h", "0x7fff + ((bits[i] >> 16) & 1)", "0x7fff + 1", FORMATS),
    Bug("cuda/cpu/simd.h", "vec p = f * (1.0f / 5040) + 1.0f / 720;", "vec p = broadcast(1.0f / 720);", FORMATS),
    Bug("cuda/cpu/simd.h", "n * 2.12194440e-4f", "n * 2.122e-4f", FORMATS),
    Bug("cuda/cpu/simd.h", "x < -limit ? -limit : x", "x < -limit ? vec{} : x", FORMATS),
    Bug(
        "cuda/cpu/wkv7_head.h",
        "sigmoid * (e * sigmoid) * -DECAY_SCALE",
        "sigmoid * (1.0f - e * sigmoid) * -DECAY_SCALE",
        "tests/ops/test_wkv7.py -k 'cpp_kernel'",
    ),
    Bug(
        "cuda/wkv7.cuh",
        "const float e = expf(-fabsf(x));",
        "const float e = expf(-x);",
        "tests/ops/test_cuda_source.py -k 'out_of_range and wkv7'",
    ),
    Bug(
        "cuda/common.cuh",
        "(T - 1) / kSteps * kSteps",
        "T / kSteps * kSteps",
        "tests/ops/test_cuda_source.py -k 'touches_memory'",
    ),
    Bug(
        "cuda/wkv6.cuh",
        "return -expf(x - expf(x));",
        "return -expf(x) * expf(-expf(x));",
        "tests/ops/test_cuda_source.py -k 'wkv6'",
    ),
    # The regions of the step on the processor.
    Bug(REGIONS, "*first <= end;", "*first < end;", f"{NATIVE} -k 'AVX2 and mix'"),
    Bug(REGIONS, "sum[i] += tile_sum[i]", "sum[i] = tile_sum[i]", f"{NATIVE} -k very_many"),
    Bug(
        REGIONS,
        "each = (tiles + BLOCKS - 1) / BLOCKS;",
        "each = (tiles + threads - 1) / threads;",
        f"{NATIVE} -k number_of_threads",
    ),
    Bug(ROWS, "start < 0 ? passes : vec{}", "passes", f"{NATIVE} -k 'AVX2 and mix'"),
    Bug(ROWS, "kept += g - g * share;", "kept += g;", f"{NATIVE} -k 'AVX2 and mix'"),
    Bug(ROWS, "length < SHORTEST ? 0.0f : sum(along)", "sum(along)", f"{NATIVE} -k 'AVX2 and pre7'"),
    Bug(ROWS, "sums + 4 * C, sums + C)", "sums + C, sums + 4 * C)", f"{NATIVE} -k 'AVX2 and pre7'"),
    Bug(
        ROWS,
        "load(DTYPE, p.dv, at + i) + load(DTYPE, p.dv_bonus, at + i)",
        "load(DTYPE, p.dv, at + i)",
        f"{NATIVE} -k 'AVX2 and pre7'",
    ),
    Bug(ROWS, "sum(squares) / N + p.eps", "sum(squares) / N + 1e-5f", f"{NATIVE} -k 'AVX2 and post7'"),
    Bug(ROWS, "x < 0.0f ? vec{} : x", "x > 0.0f ? x : vec{}", f"{NATIVE} -k not_a_number"),
    Bug(ROWS, "(d[i / LANES] - mean - y", "(d[i / LANES] - y", f"{NATIVE} -k 'AVX2 and norm'"),
    Bug(
        SIMD,
        "const uvec nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "const uvec nearest_even = bits >> 16;",
        f"{NATIVE} -k 'AVX2 and relu'",
    ),
    Bug(SIMD, "x == x ? nearest_even : 0x7fc0 + uvec{}", "nearest_even", f"{NATIVE} -k not_a_number"),
    Bug(
        f"{OPS}/regions/trial.py",
        "if not error < LIMITS[dtype]",
        "if error > 100 * LIMITS[dtype]",
        f"{NATIVE} -k trial",
    ),
    # A constant part of WKV-7's decay that the kernel adds itself.
    Bug("cuda/cpu/wkv7_head.h", "load(p.w0 + h * N + j)", "load(p.w0 + j)", "tests/ops/test_wkv7.py -k constant_part"),
    # What our ZeRO optimisers leave out of DeepSpeed's.
    Bug(f"{TRAINING}/zero.py", ".clamp(min=1.0)", "", f"{ZERO} -k 'same_to_the_bit and accumulated'"),
    Bug(f"{TRAINING}/zero.py", "[torch.zeros_like(p) if", "[torch.ones_like(p) if", f"{ZERO} -k without_a_gradient"),
    Bug(
        f"{TRAINING}/zero.py",
        "                parameter.grad = None\n",
        "                pass\n",
        f"{ZERO} -k gone_after",
    ),
    Bug(f"{TRAINING}/zero.py", "(norm * 0).ne(0).float()", "norm.new_zeros(())", f"{ZERO} -k not_taken"),
    Bug(f"{TRAINING}/zero.py", "        master.data = part  #", "        pass  #", f"{ZERO} -k takes_12"),
    Bug(f"{TRAINING}/zero.py", "        zero._link_all_hp_params()\n", "", f"{ZERO} -k takes_12"),
    # The loop of steps.
    Bug(f"{TRAINING}/strategy.py", "        elif window_finished:\n", "        else:\n", f"{ZERO} -k 'accumulated'"),
    Bug(
        f"{TRAINING}/module.py",
        "        self._set_rates(optimizer)\n        # fill_",
        "        # fill_",
        "tests/training/test_optimizer.py",
    ),
    # What a start imports.
    Bug(
        f"{OPS}/register.py",
        'vars(function)["_dynamo_marked_constant"] = True',
        "function = torch.compiler.assume_constant_result(function)",
        f"{START} -k not_imported",
    ),
    Bug(
        f"{OPS}/register.py",
        'torch.library.impl(qualified, "default", function)',
        'torch.library.impl(qualified, "default", torch.compiler.disable(function))',
        f"{START} -k not_imported",
    ),
    Bug(
        f"{TRAINING}/libraries.py",
        "_standing_in(_torchmetrics(), _dynamo())",
        "_standing_in(_torchmetrics())",
        f"{START} -k not_imported",
    ),
    Bug(
        f"{TRAINING}/libraries.py",
        "            del sys.modules[module.__name__]\n",
        "            pass\n",
        f"{START} -k not_imported",
    ),
    Bug(
        f"{TRAINING}/optimizer.py",
        "    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)\n",
        "",
        f"{START} -k not_imported",
    ),
)
