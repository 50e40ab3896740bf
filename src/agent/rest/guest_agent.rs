//! The QEMU guest agent's language: one JSON object a line, bytes from a guest that may be hostile. Pure.
//!
//! The channel has no connections: what an earlier client did not read, or did not write to its end, is still in it. So a client
//! first sends the byte 0xFF, which ends whatever the agent was reading, and `guest-sync-delimited` with a number of its own; the
//! agent answers with 0xFF and that number, and everything before it is old.

use serde_json::{Value, json};

/// Longest line of a guest that is looked at. Answers to what we ask are shorter than 200 bytes.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// Begins an answer to `guest-sync-delimited`, and ends what is old. Never part of UTF-8.
const DELIMITER: u8 = 0xFF;

/// What we say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Find the beginning of what is new, by this number.
    Sync(u32),
    /// Are the file systems frozen?
    Status,
    /// Freeze them: how many were.
    Freeze,
    /// Thaw them: how many were.
    Thaw,
}

impl Request {
    /// As it is sent.
    pub fn encode(self) -> Vec<u8> {
        let (before, message) = match self {
            Request::Sync(id) => (&[DELIMITER][..], json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } })),
            Request::Status => (&[][..], json!({ "execute": "guest-fsfreeze-status" })),
            Request::Freeze => (&[][..], json!({ "execute": "guest-fsfreeze-freeze" })),
            Request::Thaw => (&[][..], json!({ "execute": "guest-fsfreeze-thaw" })),
        };
        [before, message.to_string().as_bytes(), b"\n"].concat()
    }
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// It did what it was asked.
    Return(Value),
    /// It did not, in its words.
    Error(String),
}

/// What cannot be a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// More than [`LINE_BYTES_MAX`] without an end.
    #[error("the guest agent sends a line without an end")]
    TooLong,
    /// Not the JSON of a reply.
    #[error("the guest agent sends something that is no reply")]
    NoReply,
}

/// Bytes become replies.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// The number that ends what is old, while it is looked for.
    wanted: Option<u32>,
}

impl Decoder {
    /// Skips everything until the answer to [`Request::Sync`] with this number, which is the next reply.
    pub fn expect(&mut self, id: u32) {
        self.wanted = Some(id);
    }

    /// Takes what was read.
    ///
    /// # Errors
    /// [`Bad::TooLong`], unless what is old is being skipped.
    pub fn handle_bytes(&mut self, bytes: &[u8]) -> Result<(), Bad> {
        self.buffer.extend_from_slice(bytes);
        let line = self.buffer.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        if (self.buffer.len() - line).max(self.buffer.len() / 2) <= LINE_BYTES_MAX {
            return Ok(());
        }
        if self.wanted.is_none() {
            return Err(Bad::TooLong);
        }
        self.buffer.clear();
        Ok(())
    }

    /// The next whole reply.
    ///
    /// # Errors
    /// [`Bad::NoReply`] for a line that is none; the line is gone.
    pub fn poll_reply(&mut self) -> Result<Option<Reply>, Bad> {
        while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            let Some(id) = self.wanted else { return parse(&line).map(Some) };
            // Whatever was cut off before it, in the same line too, is old.
            let Some(delimiter) = line.iter().rposition(|b| *b == DELIMITER) else { continue };
            let reply = Reply::Return(Value::from(id));
            if parse(&line[delimiter + 1..]).as_ref() == Ok(&reply) {
                self.wanted = None;
                return Ok(Some(reply));
            }
        }
        Ok(None)
    }
}

fn parse(line: &[u8]) -> Result<Reply, Bad> {
    let Ok(Value::Object(mut object)) = serde_json::from_slice(line) else { return Err(Bad::NoReply) };
    if let Some(value) = object.remove("return") {
        return Ok(Reply::Return(value));
    }
    let error = object.remove("error").ok_or(Bad::NoReply)?;
    let words = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
    Ok(Reply::Error(words.chars().filter(|c| !c.is_control()).take(200).collect()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_what_the_agent_reads() {
        assert_eq!(Request::Status.encode(), b"{\"execute\":\"guest-fsfreeze-status\"}\n");
        let sync = Request::Sync(7).encode();
        assert_eq!(sync[0], 0xFF);
        let value: Value = serde_json::from_slice(&sync[1..]).unwrap();
        assert_eq!(value, json!({ "execute": "guest-sync-delimited", "arguments": { "id": 7 } }));
    }

    fn synced(bytes: &[u8], id: u32) -> Vec<Result<Option<Reply>, Bad>> {
        let mut decoder = Decoder::default();
        decoder.expect(id);
        // A byte at a time: what a read returns is cut anywhere.
        bytes.iter().for_each(|b| decoder.handle_bytes(&[*b]).unwrap());
        vec![decoder.poll_reply(), decoder.poll_reply()]
    }

    #[test]
    fn what_is_old_is_skipped_up_to_our_own_number() {
        let seven = Ok(Some(Reply::Return(json!(7))));
        let thawed = Ok(Some(Reply::Return(json!("thawed"))));
        let cases: [&[u8]; 6] = [
            b"",
            b"{\"return\": 3}\n",
            b"{\"retu",
            b"\xFF{\"return\": 6}\n",
            b"\xFF{\"return\":\xFF",
            b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n\xFF",
        ];
        for old in cases {
            let bytes = [old, b"\xFF{\"return\": 7}\n{\"return\": \"thawed\"}\n"].concat();
            assert_eq!(synced(&bytes, 7), [seven.clone(), thawed.clone()], "{}", String::from_utf8_lossy(old));
        }
    }

    #[test]
    fn errors_and_nonsense_are_told_apart() {
        let mut decoder = Decoder::default();
        decoder.handle_bytes(b"{\"error\": {\"class\": \"X\", \"desc\": \"no\\u0007pe\"}}\nnonsense\n{}\n").unwrap();
        assert_eq!(decoder.poll_reply(), Ok(Some(Reply::Error("nope".to_owned()))));
        assert_eq!(decoder.poll_reply(), Err(Bad::NoReply));
        assert_eq!(decoder.poll_reply(), Err(Bad::NoReply));
        assert_eq!(decoder.poll_reply(), Ok(None));
        assert_eq!(decoder.handle_bytes(&vec![b'x'; LINE_BYTES_MAX + 1]), Err(Bad::TooLong));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_within_the_bound(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 0..80), sync in any::<bool>()) {
            let mut decoder = Decoder::default();
            if sync {
                decoder.expect(1);
            }
            for chunk in chunks {
                if decoder.handle_bytes(&chunk).is_err() {
                    break;
                }
                while !matches!(decoder.poll_reply(), Ok(None)) {}
                prop_assert!(decoder.buffer.len() <= 2 * LINE_BYTES_MAX + 3000);
            }
        }
    }
}
