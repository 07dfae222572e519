//! Where the time of a conversion goes, stage by stage: read, inflate, hash, deflate, write. `tests/bench` measures the whole against its rival.
//!
//! Run: `cargo bench -p hypersdk-agent --features isal`. One thread, 4 MiB blocks of text-like data, files in memory.

#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;

use agent::formats::{Disk, DiskWriter, Encoded, Encoder, Output, Scratch, Window, deflate, is_zero, qcow2, raw, vmdk};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const BLOCK: usize = 4 << 20;

/// Words in random order: deflates to about 40 %.
fn sample(len: usize) -> Vec<u8> {
    let words = ["extent", "grain", "cluster", "datastore", "lease", "domain", "bitmap", "\0\0\0\0", "0123456789abcdef"];
    let mut state = 7u64;
    let mut data = Vec::with_capacity(len + 16);
    while data.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        data.extend_from_slice(words[(state >> 33) as usize % words.len()].as_bytes());
        data.extend_from_slice(&(state >> 40).to_le_bytes()[..2]);
    }
    data.truncate(len);
    data
}

fn file() -> Arc<File> {
    Arc::new(File::from(rustix::fs::memfd_create("hypersdk-bench", rustix::fs::MemfdFlags::CLOEXEC).unwrap()))
}

/// One block, written by `writer` after `encoder`; the file.
fn written(encoder: &dyn Encoder, data: &[u8], writer: impl FnOnce(Output) -> Box<dyn DiskWriter>) -> File {
    let (file, mut encoded) = (file(), Encoded::default());
    encoder.state().unwrap().encode(0, data, &mut encoded).unwrap();
    let mut writer = writer(Output { file: file.clone(), base: 0 });
    writer.write_block(&encoded).unwrap();
    writer.finish().unwrap();
    file.try_clone().unwrap()
}

fn stages(criterion: &mut Criterion) {
    let data = sample(BLOCK);
    let capacity = BLOCK as u64;
    let mut group = criterion.benchmark_group("4 MiB");
    group.throughput(Throughput::Bytes(capacity));

    group.bench_function("zero detection", |b| {
        let zeros = vec![0u8; BLOCK];
        b.iter(|| black_box(is_zero(black_box(&zeros))));
    });
    group.bench_function("hash: BLAKE3 in steps of 64 KiB", |b| {
        b.iter(|| {
            let mut hasher = blake3::Hasher::new();
            for unit in data.chunks(64 << 10) {
                hasher.update(unit);
            }
            hasher.finalize()
        });
    });
    for level in [deflate::FAST, 1, 6] {
        let mut state = vmdk::StreamEncoder::new(level).unwrap().state().unwrap();
        let mut out = Encoded::default();
        group.bench_function(format!("deflate: level {level}"), |b| b.iter(|| state.encode(0, black_box(&data), &mut out).unwrap()));
    }

    let plain: Arc<dyn Disk> = Arc::new({
        let file = written(&raw::Encoder, &data, |output| Box::new(raw::Writer::new(output, capacity)));
        raw::Reader::open(Window::whole(file).unwrap()).unwrap()
    });
    let stream: Arc<dyn Disk> = Arc::new({
        let encoder = vmdk::StreamEncoder::new(6).unwrap();
        let file = written(&encoder, &data, |output| Box::new(vmdk::StreamWriter::create(output, capacity, 1).unwrap()));
        vmdk::open_single(Window::whole(file).unwrap()).unwrap()
    });
    let (mut buf, mut scratch) = (vec![0u8; BLOCK], Scratch::default());
    for (name, disk) in [("read: raw", &plain), ("read and inflate: streamOptimized", &stream)] {
        group.bench_function(name, |b| b.iter(|| disk.read_at(0, &mut buf, &mut scratch).unwrap()));
    }

    let mut encoded = Encoded::default();
    raw::Encoder.state().unwrap().encode(0, &data, &mut encoded).unwrap();
    let output = Output { file: file(), base: 0 };
    group.bench_function("write: raw", |b| {
        b.iter(|| raw::Writer::new(output.clone(), capacity).write_block(&encoded).unwrap());
    });
    group.bench_function("write: qcow2", |b| {
        b.iter(|| qcow2::PlainWriter::new(output.clone(), capacity).unwrap().write_block(&encoded).unwrap());
    });
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
