//! Calls a script before and after: with a time limit for all it started, and the end of what it printed.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock;
use crate::hook;

/// Bytes of output that are kept, from its end.
const TAIL_BYTES: usize = 4 << 10;
/// Between two looks at whether it ended.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// What a script printed right before its end arrives within this time; what it left running may keep the pipe open for ever.
const DRAIN: Duration = Duration::from_millis(100);

/// Which of its two calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// Bring the application to rest.
    Pre,
    /// Set it going again.
    Post,
}

impl Call {
    fn argument(self) -> &'static str {
        match self {
            Call::Pre => "--pre",
            Call::Post => "--post",
        }
    }
}

/// Runs one call. It is ended with its process group after `limit`, or when `stop` is set.
///
/// # Errors
/// Why it did not succeed, with the end of its output.
pub(super) fn run(path: &Path, call: Call, variables: &[(&str, String)], limit: Duration, stop: &AtomicBool) -> Result<String, String> {
    let program = format!("{} {}", path.display(), call.argument());
    let named = |e: std::io::Error| format!("cannot run {program}: {e}");
    let (reader, writer) = std::io::pipe().map_err(named)?;
    let mut command = Command::new(path);
    command.arg(call.argument()).envs(variables.iter().map(|(k, v)| (k, v))).current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(writer.try_clone().map_err(named)?).stderr(writer);
    let child = command.spawn().map_err(named)?;
    // Our ends of the pipe: while one is open there is no end of file.
    drop(command);
    let output = Output::collect(reader);
    let ended = wait(child, limit, stop);
    let printed = output.tail();
    let said = if printed.is_empty() { String::new() } else { format!(": {printed}") };
    match ended {
        Ended::Status(status) if status.success() => Ok(printed),
        Ended::Status(status) => Err(format!("{}{said}", hook::ended(&program, status))),
        Ended::Late => Err(format!("{program} did not end within {} and was ended{said}", humantime::format_duration(limit))),
        Ended::Stopped => Err(format!("{program} was ended, because the time was over or nobody waits for it any more{said}")),
        Ended::Unknown(error) => Err(format!("{program}: {error}{said}")),
    }
}

enum Ended {
    Status(ExitStatus),
    Late,
    Stopped,
    Unknown(std::io::Error),
}

fn wait(mut child: Child, limit: Duration, stop: &AtomicBool) -> Ended {
    let started = clock::now();
    let given_up = loop {
        match child.try_wait() {
            // What it left running in its group is what holds the application at rest until `--post`.
            Ok(Some(status)) => return Ended::Status(status),
            Ok(None) => {}
            Err(error) => break Ended::Unknown(error),
        }
        if stop.load(Ordering::Relaxed) {
            break Ended::Stopped;
        }
        if clock::now().since(started) >= limit {
            break Ended::Late;
        }
        std::thread::sleep(LOOK_AGAIN);
    };
    hook::end_group(child.id());
    let _ = child.wait();
    given_up
}

/// The end of what comes through a pipe.
struct Output {
    tail: Arc<Mutex<Vec<u8>>>,
    closed: Arc<AtomicBool>,
}

impl Output {
    /// Reads on as long as anybody has the other end: a script that printed more than it held would wait for ever.
    fn collect(mut reader: impl Read + Send + 'static) -> Self {
        let output = Self { tail: Arc::default(), closed: Arc::default() };
        let (tail, closed) = (output.tail.clone(), output.closed.clone());
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(read @ 1..) = reader.read(&mut chunk) {
                let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                tail.extend_from_slice(&chunk[..read]);
                let old = tail.len().saturating_sub(TAIL_BYTES);
                tail.drain(..old);
            }
            closed.store(true, Ordering::Release);
        });
        output
    }

    fn tail(&self) -> String {
        let started = clock::now();
        while !self.closed.load(Ordering::Acquire) && clock::now().since(started) < DRAIN {
            std::thread::sleep(LOOK_AGAIN);
        }
        hook::shown(&self.tail.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn called(text: &str, call: Call, limit_ms: u64) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hook");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let variables = [("TIDEGATE_MACHINE", "web01".to_owned())];
        run(&path, call, &variables, Duration::from_millis(limit_ms), &AtomicBool::new(false))
    }

    #[test]
    fn a_script_learns_which_call_it_is_and_its_output_is_kept() {
        assert_eq!(called("echo $1 $TIDEGATE_MACHINE; echo no >&2", Call::Pre, 9000).unwrap(), "--pre web01\nno");
        let failed = called("echo $1; exit 3", Call::Post, 9000).unwrap_err();
        assert!(failed.contains("ended with code 3: --post"), "{failed}");
        let long = called("yes | head -c 100000; printf end", Call::Pre, 9000).unwrap();
        assert!(long.len() <= TAIL_BYTES && long.ends_with("end"), "{}", long.len());
    }

    #[test]
    fn a_script_that_hangs_is_ended_with_all_it_started() {
        let started = clock::now();
        let late = called("sleep 60 & echo begun; sleep 60", Call::Pre, 300).unwrap_err();
        assert!(late.contains("did not end within 300ms") && late.contains("begun"), "{late}");
        assert!(clock::now().since(started) < Duration::from_secs(30));
        // What it leaves running on purpose is left alone, and not waited for.
        assert_eq!(called("sleep 1 & echo left", Call::Pre, 9000).unwrap(), "left");
    }
}
