//! Write checkpoints of a Rust engine for `parity diff` and `parity lint`. No dependency. Printed by `parity emit rust`.
//!
//!     // the arithmetic of your products ("f32", "tf32", "f16", "bf16", "q8"; "" if it is not known), and how many leading values each record holds
//!     let mut tap = parity_dump::Recorder::create("ours.jsonl", "my-model", &tokens, "f32", 16)?;
//!     tap.only(&points); // what {points} of `parity run --exec` gives; without it, all
//!     tap.pass(step, decode); // before each forward pass, from 0: for `parity consistency`
//!     tap.sequence(number); // where several prompts are computed together: before the checkpoints of each, from 0
//!     tap.checkpoint("blk.5.l_out", position, &hidden)?; // all values of one position, in host memory
//!     tap.finish()?;
use std::fs::File;
use std::io::{BufWriter, Error, ErrorKind, Result, Write};

pub struct Recorder { out: BufWriter<File>, records: u64, slice: usize, only: Option<Vec<String>>, seq: usize, step: usize, phase: &'static str }

fn number(x: f64) -> String {
    if x.is_nan() { "\"NaN\"".into() } else if x.is_infinite() { format!("\"{}Infinity\"", if x > 0.0 { "" } else { "-" }) } else { format!("{x:e}") }
}

fn list(values: &[f32]) -> String {
    // {:e} of an f32 prints the fewest digits that reproduce it.
    values.iter().map(|x| if x.is_finite() { format!("{x:e}") } else { number(*x as f64) }).collect::<Vec<_>>().join(",")
}

/// A text as JSON has it.
fn quoted(text: &str) -> String {
    let mut json = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => { json.push('\\'); json.push(c); }
            c if c < ' ' => json.push_str(&format!("\\u{:04x}", c as u32)),
            c => json.push(c),
        }
    }
    json + "\""
}

/// What `compute` may be; readers know the other words for these, too.
const ARITHMETIC: [&str; 6] = ["f64", "f32", "tf32", "f16", "bf16", "q8"];
const OTHER_WORDS: [&str; 14] =
    ["float64", "fp64", "double", "float32", "fp32", "float", "single", "tensorfloat32", "float16", "fp16", "half", "bfloat16", "int8", "i8"];

impl Recorder {
    pub fn create(path: &str, model: &str, tokens: &[u32], compute: &str, slice: usize) -> Result<Self> {
        let word = compute.to_ascii_lowercase();
        if !(word.is_empty() || ARITHMETIC.contains(&word.as_str()) || OTHER_WORDS.contains(&word.as_str())) {
            let known = ARITHMETIC.join(", ");
            return Err(Error::new(ErrorKind::InvalidInput, format!("compute is {compute:?}: write one of {known}, or \"\" if it is not known")));
        }
        let mut out = BufWriter::new(File::create(path)?);
        writeln!(out, "{{\"type\":\"header\",\"format\":1,\"source\":\"rust\",\"model\":{{\"name\":{}}},\"tokens\":{tokens:?},\"compute\":\"{compute}\",\"slice\":{slice}}}", quoted(model))?;
        Ok(Self { out, records: 0, slice, only: None, seq: 0, step: 0, phase: "prefill" })
    }

    /// Record these points only: names with commas; an empty text stands for all.
    #[allow(dead_code)]
    pub fn only(&mut self, names: &str) {
        self.only = if names.is_empty() { None } else { Some(names.split(',').map(str::to_string).collect()) };
    }

    /// Call before each forward pass: its number (from 0) and whether it decodes a single token.
    #[allow(dead_code)]
    pub fn pass(&mut self, step: usize, decode: bool) {
        self.step = step;
        self.phase = if decode { "decode" } else { "prefill" };
    }

    /// Call before the checkpoints of another prompt, where several are computed together: its number, from 0.
    #[allow(dead_code)]
    pub fn sequence(&mut self, number: usize) {
        self.seq = number;
    }

    pub fn checkpoint(&mut self, point: &str, position: usize, row: &[f32]) -> Result<()> {
        if self.only.as_ref().is_some_and(|names| !names.iter().any(|name| name == point)) { return Ok(()); }
        let (mut sum, mut squares, mut sketch, mut nonfinite) = (0f64, 0f64, [0f64; 32], 0);
        for (i, &value) in row.iter().enumerate() {
            if !value.is_finite() { nonfinite += 1; continue; }
            let x = value as f64;
            let mut h = i as u32 + 1; // MurmurHash3's finaliser: bit j is the sign of projection j
            h ^= h >> 16; h = h.wrapping_mul(0x85EB_CA6B); h ^= h >> 13; h = h.wrapping_mul(0xC2B2_AE35); h ^= h >> 16;
            sum += x;
            squares += x * x;
            for (j, s) in sketch.iter_mut().enumerate() { *s += if h >> j & 1 == 1 { x } else { -x }; }
        }
        let sketch: Vec<f32> = sketch.iter().map(|&s| s as f32).collect();
        self.records += 1;
        writeln!(self.out,
            "{{\"checkpoint\":{},\"seq\":{},\"token_idx\":{position},\"step\":{},\"phase\":\"{}\",\"dtype\":\"f32\",\"shape\":[{}],\"values\":[{}],\"stats\":{{\"n\":{},\"sum\":{},\"l2\":{},\"nonfinite\":{nonfinite}}},\"sketch\":[{}]}}",
            quoted(point), self.seq, self.step, self.phase, row.len(), list(&row[..row.len().min(self.slice)]), row.len(), number(sum), number(squares.sqrt()), list(&sketch))
    }

    pub fn finish(mut self) -> Result<()> {
        writeln!(self.out, "{{\"type\":\"end\",\"checkpoints\":{},\"tokens\":0}}", self.records)?;
        self.out.flush()
    }
}
