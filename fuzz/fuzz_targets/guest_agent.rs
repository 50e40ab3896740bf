//! Replies of a guest's agent.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tidegate_fuzz::guest_agent(data));
