//! Looks through a file in order, a large part at once: records are small, and each would cost a read.

use std::io;

use super::record::pages_of;
use crate::storage::{ALIGN, AlignedBuf, File};

/// Bytes that are read at once.
pub(super) const WINDOW_BYTES: u64 = 1 << 20;

/// The part that was read last.
pub(super) struct Window {
    at: u64,
    bytes: AlignedBuf,
    /// Something before this cannot be read: until it is passed no more is read than what is asked for.
    narrow_until: u64,
}

impl Window {
    pub(super) fn new() -> Self {
        Self { at: 0, bytes: AlignedBuf::with_capacity(0), narrow_until: 0 }
    }

    /// `len` bytes of a file of `file_len`; `None` if it ends before.
    pub(super) async fn look<F: File>(&mut self, file: &F, at: u64, len: u64, file_len: u64) -> io::Result<Option<&[u8]>> {
        let needed = pages_of(at, len);
        if needed.end > file_len {
            return Ok(None);
        }
        if needed.start < self.at || needed.end > self.at + self.bytes.len() as u64 {
            let wide = needed.end.max(needed.start + WINDOW_BYTES).min(file_len / ALIGN as u64 * ALIGN as u64);
            let read = async |end: u64| file.read_at(needed.start, (end - needed.start) as usize).await;
            let read_wide = if needed.start < self.narrow_until { None } else { Some(read(wide).await) };
            self.bytes = match read_wide {
                Some(Ok(bytes)) => bytes,
                // It may be what nobody needs that cannot be read.
                other => {
                    if other.is_some() {
                        self.narrow_until = wide;
                    }
                    read(needed.end).await?
                }
            };
            self.at = needed.start;
        }
        let from = (at - self.at) as usize;
        Ok(self.bytes.get(from..from + len as usize))
    }
}
