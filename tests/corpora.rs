//! Replays the corpora of the fuzz targets: bytes that were once interesting to a parser, and must never be fatal.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests may unwrap, and wait by the clock")]

#[path = "../fuzz/src/lib.rs"]
#[allow(clippy::expect_used, unreachable_pub, reason = "a fuzz target may panic, and is a library of its own")]
mod targets;

#[test]
fn every_input_that_was_kept_is_parsed_or_refused() {
    let mut replayed = 0;
    for (name, target) in targets::TARGETS {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut files: Vec<_> =
            std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())).map(|f| f.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in &files {
            let bytes = std::fs::read(file).unwrap();
            target(&bytes);
            // Cut anywhere: what a torn write or a truncated copy leaves.
            for cut in [bytes.len() / 2, bytes.len().saturating_sub(1)] {
                target(&bytes[..cut]);
            }
            replayed += 1;
        }
    }
    println!("{replayed} inputs of {} targets replayed", targets::TARGETS.len());
}
