//! Makes the sample disk: an ext4 file system with files of mixed content, and an area for the workload behind it.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use crate::model::Extent;

/// A sample disk.
pub(super) struct Sample {
    /// Bytes of data on it.
    pub bytes: u64,
    /// Where the workload may write.
    pub workload_area: Extent,
}

/// Removes what an earlier quickstart left in `state`.
pub(super) fn clear(state: &Path) -> anyhow::Result<()> {
    for name in ["agent", "process-server", "master-target", "recovered", "files"] {
        let dir = state.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    for name in ["disk.raw", "model.raw"] {
        let _ = fs::remove_file(state.join(name));
    }
    Ok(())
}

/// Makes the disk at `disk`. Three quarters are a file system, mostly full; the rest is the workload's.
pub(super) fn make(state: &Path, disk: &Path, size: u64) -> anyhow::Result<Sample> {
    let area = Extent::new(size / 4 * 3 / 4096 * 4096, size - size / 4 * 3 / 4096 * 4096);
    File::create(disk)?.set_len(size)?;
    if !make_file_system(state, disk, area.offset)? {
        // Without mkfs the sample holds the same kind of bytes, only not as files.
        let file = File::options().write(true).open(disk)?;
        let mut content = Content::new(1);
        for at in (0..area.offset / 5 * 4).step_by(1 << 20) {
            file.write_all_at(content.next(1 << 20), at)?;
        }
    }
    let file = File::open(disk)?;
    file.sync_all()?;
    let bytes = file.metadata()?.blocks() * 512;
    Ok(Sample { bytes, workload_area: area })
}

fn make_file_system(state: &Path, disk: &Path, size: u64) -> anyhow::Result<bool> {
    let files = state.join("files");
    fs::create_dir_all(&files)?;
    let mut content = Content::new(2);
    let mut left = size / 5 * 4;
    let mut number = 0;
    while left > 0 {
        let len = [40 << 10, 900 << 10, 7 << 20, 33 << 20][number % 4].min(left);
        let mut out = BufWriter::new(File::create(files.join(format!("file-{number:05}")))?);
        let mut rest = len;
        while rest > 0 {
            let step = rest.min(1 << 20);
            out.write_all(content.next(step as usize))?;
            rest -= step;
        }
        out.flush()?;
        left -= len;
        number += 1;
    }
    let blocks = (size / 4096).to_string();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-b", "4096", "-m", "0", "-d"]).arg(&files).arg(disk).arg(&blocks).output();
    fs::remove_dir_all(&files)?;
    match made {
        Ok(output) if output.status.success() => Ok(true),
        Ok(output) => anyhow::bail!("mkfs.ext4 failed: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(_) => Ok(false),
    }
}

/// Bytes that compress about 2:1: words of a small vocabulary between random runs.
pub(super) struct Content {
    state: u64,
    buffer: Vec<u8>,
}

impl Content {
    /// A stream of bytes that depends on `seed` only.
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, buffer: Vec::new() }
    }

    /// A random number (xorshift64*, Vigna 2016).
    pub(super) fn random(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// The next `len` bytes.
    pub(super) fn next(&mut self, len: usize) -> &[u8] {
        self.buffer.clear();
        while self.buffer.len() < len {
            let pick = self.random();
            if pick.is_multiple_of(2) {
                for _ in 0..8 {
                    let word = self.random();
                    self.buffer.extend_from_slice(&word.to_le_bytes());
                }
            } else {
                let word: &[u8] = [
                    &b"the tide that leaves the shore "[..],
                    b"returns before the morning bell ",
                    b"a gate is made to be opened twice ",
                    b"one harbour keeps another's charts ",
                ][(pick >> 8) as usize % 4];
                self.buffer.extend_from_slice(word);
                self.buffer.extend_from_slice(word);
            }
        }
        self.buffer.truncate(len);
        &self.buffer
    }
}
