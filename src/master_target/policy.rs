//! The policy in use: the configuration's values, and over them those that a person set. One value for all who ask.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::control::api::PolicyValues;
use crate::model::Policy;

/// Most points of a machine that may be asked for.
const POINTS_MAX: usize = 100_000;

/// See the module.
pub struct LivePolicy {
    configured: Policy,
    set: Mutex<(PolicyValues, u64)>,
}

impl LivePolicy {
    /// The policy at start: `set` is what the catalogue has.
    pub fn new(configured: Policy, set: PolicyValues) -> Self {
        Self { configured, set: Mutex::new((set, 0)) }
    }

    /// The policy in use.
    pub fn now(&self) -> Policy {
        let set = self.set();
        over(&self.configured, &set).unwrap_or_else(|error| {
            tracing::warn!(error, "a policy that was set does not fit the configuration any more; the configuration counts");
            self.configured.clone()
        })
    }

    /// What a person set.
    pub fn set(&self) -> PolicyValues {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Counts changes.
    pub fn version(&self) -> u64 {
        self.set.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// What the policy would be with `values` set.
    ///
    /// # Errors
    /// A sentence.
    pub fn with(&self, values: &PolicyValues) -> Result<Policy, String> {
        over(&self.configured, values)
    }

    /// Uses `values`, which are durable.
    pub fn replace(&self, values: PolicyValues) {
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
    fn what_was_set_covers_the_configuration_value_by_value_until_it_is_reset() {
        let configured = Policy { ladder: "all for 1d".parse().unwrap(), points_max: 100, points_min: 1, span: None, space_max: Some(5) };
        let policy = LivePolicy::new(configured.clone(), PolicyValues::default());
        assert_eq!(policy.now(), configured);
        let first = PolicyValues { points_max: Some(10), space_max_bytes: Some(0), ..PolicyValues::default() };
        policy.replace(first.clone());
        assert_eq!(policy.now(), Policy { points_max: 10, space_max: None, ..configured.clone() });
        let second = PolicyValues { span_seconds: Some(60), points_max: Some(20), ..PolicyValues::default() };
        policy.replace(merged(policy.set(), second));
        let both = Policy { points_max: 20, space_max: None, span: Some(Duration::from_secs(60)), ..configured.clone() };
        assert_eq!((policy.now(), policy.version()), (both, 2));
        assert!(policy.with(&PolicyValues { points_min: Some(200), ..PolicyValues::default() }).is_err());
        assert!(policy.with(&PolicyValues { ladder: Some("often".to_owned()), ..PolicyValues::default() }).is_err());
        policy.replace(PolicyValues::default());
        assert_eq!(policy.now(), configured);
    }
}
