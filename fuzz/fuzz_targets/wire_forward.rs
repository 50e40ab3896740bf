//! Prefixes and messages between process server and master target.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::wire::decode_control;
use tidegate::wire::forward::{Open, PREFIX_LEN, Prefix, Reply};

fuzz_target!(|data: &[u8]| {
    if let Some(head) = data.first_chunk::<PREFIX_LEN>() {
        let _ = Prefix::decode(head);
    }
    let _ = decode_control::<Open>(data);
    let _ = decode_control::<Reply>(data);
});
