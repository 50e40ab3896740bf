//! Frames and messages between agent and process server.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate::wire::decode_control;
use tidegate::wire::ingest::{AgentMessage, FRAME_LEN, Frame, ServerMessage};

fuzz_target!(|data: &[u8]| {
    if let Some(head) = data.first_chunk::<FRAME_LEN>()
        && let Ok(frame) = Frame::decode(head)
    {
        assert_eq!(frame.encode()[..52], head[..52]);
    }
    let _ = decode_control::<AgentMessage>(data);
    let _ = decode_control::<ServerMessage>(data);
});
