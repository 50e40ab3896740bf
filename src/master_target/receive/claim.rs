//! Who may write a disk: one process server in one epoch. Pure.
//!
//! A higher epoch takes a disk over, whoever brings it. An equal one goes on, for the process server that has it. Both the epoch
//! and the process server are durable before they are obeyed, so that whoever wakes late is refused even after a crash.

use crate::model::Name;
use crate::model::position::EPOCH_STEP_MAX;

/// What an opening of a disk's stream means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The stream that is obeyed goes on.
    GoesOn,
    /// A new one takes the disk over: to be noted before it is obeyed.
    TakesOver,
}

/// An epoch that is not obeyed, or not by this process server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// The one that is.
    pub obeyed: u64,
}

/// Judges an opening with `epoch` by the process server `who`, while `owner` has the disk in the epoch `obeyed`.
///
/// # Errors
/// [`Fenced`]; nothing changes.
pub fn judge(obeyed: u64, owner: Option<&Name>, epoch: u64, who: &Name) -> Result<Claim, Fenced> {
    if crate::sabotage::is("no-fence") {
        return Ok(Claim::TakesOver);
    }
    match epoch.checked_sub(obeyed) {
        Some(0) if owner.is_none_or(|owner| owner == who) => Ok(if owner.is_none() { Claim::TakesOver } else { Claim::GoesOn }),
        Some(1..=EPOCH_STEP_MAX) => Ok(Claim::TakesOver),
        _ => Err(Fenced { obeyed }),
    }
}

/// Whether a batch of the stream that is obeyed may raise the epoch to this one.
pub fn may_raise(obeyed: u64, epoch: u64) -> bool {
    epoch.checked_sub(obeyed).is_some_and(|step| step <= EPOCH_STEP_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_server_has_a_disk_in_one_epoch() {
        let (a, b): (Name, Name) = ("a".parse().unwrap(), "b".parse().unwrap());
        assert_eq!(judge(5, Some(&a), 5, &a), Ok(Claim::GoesOn));
        assert_eq!(judge(5, Some(&a), 6, &b), Ok(Claim::TakesOver));
        assert_eq!(judge(5, Some(&a), 6, &a), Ok(Claim::TakesOver));
        assert_eq!(judge(5, None, 5, &b), Ok(Claim::TakesOver));
        for (epoch, who) in [(5, &b), (4, &a), (0, &b), (u64::MAX, &a)] {
            assert_eq!(judge(5, Some(&a), epoch, who), Err(Fenced { obeyed: 5 }), "{epoch} {who}");
        }
    }
}
