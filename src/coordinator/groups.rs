//! Groups and their members: who may be in which, what changes an epoch. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::Name;
use crate::model::group::GROUP_MEMBERS_MAX;

/// Most groups of one coordinator.
pub const GROUPS_MAX: usize = 1024;

/// How a group's points are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupPolicy {
    /// Time between crash-consistent points.
    pub interval: Duration,
    /// Time between application-consistent ones, if there are any by the clock.
    pub app_interval: Option<Duration>,
    /// Rather a point without some members than none.
    pub partial: bool,
    /// Rather no application-consistent point than one that is crash-consistent instead.
    pub app_or_nothing: bool,
}

impl Default for GroupPolicy {
    fn default() -> Self {
        Self { interval: Duration::from_secs(30), app_interval: None, partial: true, app_or_nothing: false }
    }
}

impl GroupPolicy {
    /// # Errors
    /// Names what is out of bounds.
    pub fn check(&self) -> Result<(), String> {
        let bounds = Duration::from_secs(1)..=Duration::from_secs(86400);
        for (what, time) in [("interval", Some(self.interval)), ("app interval", self.app_interval)] {
            if time.is_some_and(|t| !bounds.contains(&t)) {
                return Err(format!("the {what} of a group is between 1s and 24h"));
            }
        }
        Ok(())
    }
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name.
    pub name: Name,
    /// Grows with every change of its members, also over a loss of this catalogue.
    pub epoch: u64,
    /// Its machines.
    pub members: BTreeSet<Name>,
    /// How its points are made.
    pub policy: GroupPolicy,
}

/// All groups.
#[derive(Clone, Debug, Default)]
pub struct Groups(BTreeMap<Name, Group>);

impl Groups {
    /// As the catalogue has them.
    pub fn load(groups: Vec<Group>) -> Self {
        Self(groups.into_iter().map(|g| (g.name.clone(), g)).collect())
    }

    /// A group.
    ///
    /// # Errors
    /// Says which there are.
    pub fn get(&self, name: &str) -> Result<&Group, String> {
        let found = self.0.iter().find(|(n, _)| n.as_str() == name).map(|(_, g)| g);
        found.ok_or_else(|| {
            let all: Vec<_> = self.0.keys().map(Name::as_str).collect();
            let all = if all.is_empty() {
                "there are none; make one with `tidegate group create`".to_owned()
            } else {
                format!("there are {}", all.join(", "))
            };
            format!("no group is called {name:?}: {all}")
        })
    }

    /// All of them by name.
    pub fn all(&self) -> impl Iterator<Item = &Group> {
        self.0.values()
    }

    /// The group of a machine.
    pub fn of(&self, machine: &Name) -> Option<&Group> {
        self.0.values().find(|g| g.members.contains(machine))
    }

    /// A new group; nothing is changed here. `now_ms` keeps the epoch above those of a lost catalogue. `target_of` is the master
    /// target that a machine replicates to, where it is known.
    ///
    /// # Errors
    /// For a person.
    pub fn create(
        &self,
        name: &Name,
        members: &[Name],
        policy: GroupPolicy,
        now_ms: i64,
        target_of: &dyn Fn(&Name) -> Option<Name>,
    ) -> Result<Group, String> {
        if self.0.contains_key(name) {
            return Err(format!("there is a group {name} already: add machines with `tidegate group add {name} MACHINE`"));
        }
        if self.0.len() >= GROUPS_MAX {
            return Err(format!("a coordinator keeps at most {GROUPS_MAX} groups"));
        }
        let empty = Group { name: name.clone(), epoch: 0, members: BTreeSet::new(), policy };
        self.change(&empty, members, &[], now_ms, target_of)
    }

    /// A group with machines added and removed; nothing is changed here.
    ///
    /// # Errors
    /// As [`Groups::create`].
    pub fn change(
        &self,
        group: &Group,
        add: &[Name],
        remove: &[Name],
        now_ms: i64,
        target_of: &dyn Fn(&Name) -> Option<Name>,
    ) -> Result<Group, String> {
        group.policy.check()?;
        let mut members = group.members.clone();
        for machine in remove {
            if !members.remove(machine) {
                return Err(format!("machine {machine} is not in group {}", group.name));
            }
        }
        for machine in add {
            if let Some(other) = self.of(machine) {
                let whose = if other.name == group.name { "this group already".to_owned() } else { format!("group {}", other.name) };
                return Err(format!("machine {machine} is in {whose}; a machine belongs to one group: remove it there first"));
            }
            members.insert(machine.clone());
        }
        if members.is_empty() {
            return Err(format!("group {} would have no machine: delete it with `tidegate group delete {}`", group.name, group.name));
        }
        if members.len() > GROUP_MEMBERS_MAX {
            return Err(format!("a group has at most {GROUP_MEMBERS_MAX} machines, this would be {}", members.len()));
        }
        let mut targets: BTreeMap<Name, Name> = BTreeMap::new();
        for machine in &members {
            if let Some(target) = target_of(machine) {
                targets.entry(target).or_insert_with(|| machine.clone());
            }
        }
        if targets.len() > 1 {
            let told: Vec<_> = targets.iter().map(|(target, machine)| format!("{machine} to {target}")).collect();
            return Err(format!(
                "a group lives on one master target, but these machines replicate to different ones ({}): move them first, or make a group for each",
                told.join(", ")
            ));
        }
        let epoch = u64::try_from(now_ms).unwrap_or(0).max(group.epoch + 1);
        Ok(Group { epoch, members, ..group.clone() })
    }

    /// The catalogue has it.
    pub fn put(&mut self, group: Group) {
        self.0.insert(group.name.clone(), group);
    }

    /// The catalogue has it no more.
    pub fn remove(&mut self, name: &Name) {
        self.0.remove(name);
    }
}

/// The master target on which a group lives: that of most of its members, of equals the first by name.
pub fn home(targets: impl Iterator<Item = Name>) -> Option<Name> {
    let mut counts: BTreeMap<Name, usize> = BTreeMap::new();
    for target in targets {
        *counts.entry(target).or_default() += 1;
    }
    let most = counts.values().max().copied()?;
    counts.into_iter().find(|(_, n)| *n == most).map(|(target, _)| target)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn a_machine_is_in_one_group_and_every_change_of_members_has_a_higher_epoch() {
        let mut groups = Groups::default();
        let unknown = |_: &Name| None;
        let shop = groups.create(&name("shop"), &[name("db"), name("web")], GroupPolicy::default(), 1000, &unknown).unwrap();
        assert_eq!(shop.epoch, 1000);
        groups.put(shop.clone());
        assert!(groups.create(&name("shop"), &[name("x")], GroupPolicy::default(), 0, &unknown).is_err());
        let refused = groups.create(&name("other"), &[name("db")], GroupPolicy::default(), 0, &unknown).unwrap_err();
        assert!(refused.contains("is in group shop"), "{refused}");
        // The clock has gone back.
        let grown = groups.change(&shop, &[name("queue")], &[], 5, &unknown).unwrap();
        assert_eq!((grown.epoch, grown.members.len()), (1001, 3));
        assert!(groups.change(&shop, &[], &[name("db"), name("web")], 5, &unknown).unwrap_err().contains("no machine"));
        assert!(groups.change(&shop, &[], &[name("nobody")], 5, &unknown).is_err());
        assert!(groups.get("shp").unwrap_err().contains("shop"));
    }

    #[test]
    fn a_group_lives_on_one_master_target() {
        let groups = Groups::default();
        let target = |machine: &Name| Some(name(if machine.as_str() == "db" { "north" } else { "south" }));
        let refused = groups.create(&name("shop"), &[name("db"), name("web")], GroupPolicy::default(), 1, &target).unwrap_err();
        assert!(refused.contains("db to north") && refused.contains("web to south"), "{refused}");
        assert_eq!(home([name("b"), name("a"), name("b")].into_iter()), Some(name("b")));
        assert_eq!(home([name("b"), name("a")].into_iter()), Some(name("a")));
        assert_eq!(home(std::iter::empty()), None);
    }

    #[test]
    fn policies_have_bounds() {
        assert!(GroupPolicy::default().check().is_ok());
        assert!(GroupPolicy { interval: Duration::from_millis(10), ..GroupPolicy::default() }.check().is_err());
        assert!(GroupPolicy { app_interval: Some(Duration::ZERO), ..GroupPolicy::default() }.check().is_err());
    }
}
