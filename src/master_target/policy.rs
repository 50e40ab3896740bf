//! The policy in use: the configuration's values, over them those that a person set, and over both those of the machine.
//! One value for all who ask.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::config::master_target::{Machine, OwnRetain};
use crate::control::api::PolicyValues;
use crate::model::Policy;

/// Most points of a machine that may be asked for.
const POINTS_MAX: usize = 100_000;

/// Values that a person set: for one machine by its name, for all under the empty name.
pub type SetValues = BTreeMap<String, PolicyValues>;

/// See the module.
pub struct LivePolicy {
    configured: Policy,
    /// Of machines that have values of their own in the configuration.
    configured_own: SetValues,
    set: Mutex<(SetValues, u64)>,
}

impl LivePolicy {
    /// The policy at start: `set` is what the catalogue has.
    pub fn new(configured: Policy, configured_own: SetValues, set: SetValues) -> Self {
        Self { configured, configured_own, set: Mutex::new((set, 0)) }
    }

    /// The policy in use for a machine.
    pub fn now(&self, machine: &str) -> Policy {
        self.of(&self.set(), machine).unwrap_or_else(|error| {
            tracing::warn!(machine, error, "a policy that was set does not fit the configuration any more; the configuration counts");
            self.of(&SetValues::new(), machine).unwrap_or_else(|_| self.configured.clone())
        })
    }

    /// What a person set.
    pub fn set(&self) -> SetValues {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Counts changes.
    pub fn version(&self) -> u64 {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// The policy of machines without values of their own, with `set`.
    ///
    /// # Errors
    /// A sentence.
    pub fn common(&self, set: &SetValues) -> Result<Policy, String> {
        over(&self.configured, &set.get("").cloned().unwrap_or_default())
    }

    /// A machine's policy with `set`: what is said of the machine covers what is said of all, and what was set covers the
    /// configuration.
    ///
    /// # Errors
    /// A sentence.
    pub fn of(&self, set: &SetValues, machine: &str) -> Result<Policy, String> {
        over(&self.common(set)?, &self.own(set, machine))
    }

    /// A machine's own values with `set`.
    pub fn own(&self, set: &SetValues, machine: &str) -> PolicyValues {
        let of = |values: &SetValues| values.get(machine).cloned().unwrap_or_default();
        merged(of(&self.configured_own), of(set))
    }

    /// Uses `values`, which are durable.
    pub fn replace(&self, values: SetValues) {
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        *set = (values, set.1 + 1);
    }
}

/// `values` over a policy.
fn over(policy: &Policy, values: &PolicyValues) -> Result<Policy, String> {
    let unbounded = |value: u64| (value > 0).then_some(value);
    let policy = Policy {
        ladder: values.ladder.as_deref().map_or_else(|| Ok(policy.ladder.clone()), str::parse)?,
        points_max: values.points_max.unwrap_or(policy.points_max),
        points_min: values.points_min.unwrap_or(policy.points_min),
        span: values.span_seconds.map_or(policy.span, |s| unbounded(s).map(Duration::from_secs)),
        space_max: values.space_max_bytes.map_or(policy.space_max, unbounded),
    };
    if !(1..=POINTS_MAX).contains(&policy.points_max) {
        return Err(format!("--points-max must lie between 1 and {POINTS_MAX}"));
    }
    if !(1..=policy.points_max).contains(&policy.points_min) {
        return Err(format!("--points-min must lie between 1 and --points-max, which is {}", policy.points_max));
    }
    Ok(policy)
}

/// Values of their own that machines have in the configuration.
pub fn of_configuration(machines: &[Machine]) -> SetValues {
    let own = |own: &OwnRetain| PolicyValues {
        ladder: own.ladder.as_ref().map(ToString::to_string),
        points_max: own.points_max,
        points_min: own.points_min,
        span_seconds: own.span.map(|s| s.as_secs()),
        space_max_bytes: own.space_max,
    };
    machines.iter().filter_map(|m| Some((m.name.to_string(), own(m.retain.as_ref()?)))).collect()
}

/// `newer` over `older`, value by value.
pub fn merged(older: PolicyValues, newer: PolicyValues) -> PolicyValues {
    PolicyValues {
        ladder: newer.ladder.or(older.ladder),
        points_max: newer.points_max.or(older.points_max),
        points_min: newer.points_min.or(older.points_min),
        span_seconds: newer.span_seconds.or(older.span_seconds),
        space_max_bytes: newer.space_max_bytes.or(older.space_max_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_set_covers_the_configuration_and_what_is_the_machines_own_covers_both() {
        let configured = Policy { ladder: "all for 1d".parse().unwrap(), points_max: 100, points_min: 1, span: None, space_max: Some(5) };
        let small = PolicyValues { points_max: Some(7), ..PolicyValues::default() };
        let policy = LivePolicy::new(configured.clone(), [("m2".to_owned(), small)].into(), SetValues::new());
        assert_eq!(policy.now("m1"), configured);
        assert_eq!(policy.now("m2"), Policy { points_max: 7, ..configured.clone() });
        let first = PolicyValues { points_max: Some(10), space_max_bytes: Some(0), ..PolicyValues::default() };
        policy.replace([(String::new(), first.clone())].into());
        assert_eq!(policy.now("m1"), Policy { points_max: 10, space_max: None, ..configured.clone() });
        assert_eq!(policy.now("m2"), Policy { points_max: 7, space_max: None, ..configured.clone() });
        let second = PolicyValues { span_seconds: Some(60), points_max: Some(20), ..PolicyValues::default() };
        policy.replace(
            [(String::new(), merged(first, second)), ("m2".to_owned(), PolicyValues { points_max: Some(3), ..PolicyValues::default() })]
                .into(),
        );
        let both = Policy { points_max: 20, space_max: None, span: Some(Duration::from_secs(60)), ..configured.clone() };
        assert_eq!((policy.now("m1"), policy.version()), (both.clone(), 2));
        assert_eq!(policy.now("m2"), Policy { points_max: 3, ..both });
        let set = |values| SetValues::from([(String::new(), values)]);
        assert!(policy.common(&set(PolicyValues { points_min: Some(200), ..PolicyValues::default() })).is_err());
        assert!(policy.common(&set(PolicyValues { ladder: Some("often".to_owned()), ..PolicyValues::default() })).is_err());
        policy.replace(SetValues::new());
        assert_eq!(policy.now("m1"), configured);
    }
}
