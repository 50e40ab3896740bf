//! What the runners of other people's commands share: ending a whole process group, and showing what a command printed. Runs
//! nothing itself.

use std::process::ExitStatus;

use rustix::process::{Pid, Signal, kill_process_group};

/// Ends everything in the process group of `leader`.
pub fn end_group(leader: u32) {
    if let Some(pid) = Pid::from_raw(leader.cast_signed()) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// How a command that failed ended.
pub fn ended(program: &str, status: ExitStatus) -> String {
    status.code().map_or_else(|| format!("{program} was ended by a signal"), |code| format!("{program} ended with code {code}"))
}

/// Output as it may be shown: without what moves a terminal's cursor.
pub fn shown(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    text.trim().chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}
