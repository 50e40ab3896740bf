//! `tidegate status`: is it working?

use std::process::ExitCode;

use super::{Ask, ask, output};
use crate::config::units::show_size;
use crate::control::api::{Request, RoleStatus};
use crate::control::groups::{GroupMoment, GroupStatus};
use crate::model::Health;

/// Prints one screen and answers by exit code.
pub(super) fn run(args: &Ask) -> ExitCode {
    let status: Vec<RoleStatus> = match ask(&args.control, &Request::Status) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("tidegate: {error:#}");
            return ExitCode::from(3);
        }
    };
    if args.json {
        if output::json(&status).is_err() {
            return ExitCode::from(3);
        }
    } else {
        status.iter().for_each(print);
    }
    match status.iter().map(|r| r.health).max() {
        Some(Health::Healthy) => ExitCode::SUCCESS,
        Some(Health::Warning) => ExitCode::from(1),
        Some(Health::Critical) => ExitCode::from(2),
        None => ExitCode::from(3),
    }
}

fn print(role: &RoleStatus) {
    println!("{} {}: {}", role.role, role.name, role.health.as_str());
    if let Some(reason) = &role.reason {
        println!("  {reason}");
    }
    if let Some(remedy) = &role.remedy {
        println!("  do: {remedy}");
    }
    if let Some(gateway) = &role.gateway {
        println!("  sends to process server {gateway}");
    }
    if let Some((used, capacity)) = role.cache_bytes {
        println!("  cache {} of {}", show_size(used), show_size(capacity));
    }
    super::group::print_all(&role.coordinated);
    let mut rows = Vec::new();
    for machine in &role.machines {
        for disk in &machine.disks {
            let split = disk
                .rpo_parts
                .map_or_else(String::new, |p| format!("{:.0}/{:.0}/{:.0}/{:.0} ms", p[0] * 1e3, p[1] * 1e3, p[2] * 1e3, p[3] * 1e3));
            rows.push(vec![
                format!("{}/{}", machine.name, disk.name),
                disk.state.clone(),
                disk.health.as_str().to_owned(),
                if role.role == "master-target" { output::seconds(disk.rpo_seconds) } else { "-".to_owned() },
                split,
                show_size(disk.missing_bytes),
                show_size(disk.backlog_bytes + disk.waiting_bytes),
                output::count(machine.points),
                machine.oldest_point.clone().unwrap_or_else(|| "-".to_owned()),
                machine.newest_point.clone().unwrap_or_else(|| "-".to_owned()),
            ]);
        }
    }
    for machine in &role.machines {
        if let Some(group) = &machine.group {
            println!("  {} belongs to group {group}", machine.name);
        }
        if let Some(failover) = &machine.failover {
            println!("  {}: {failover}", machine.name);
        }
    }
    if !rows.is_empty() {
        output::table(
            &["DISK", "STATE", "HEALTH", "RPO", "SOURCE/GATEWAY/LINK/APPLY", "MISSING", "WAITING", "POINTS", "OLDEST", "NEWEST"],
            &rows,
        );
    }
    print_groups(role);
    for machine in &role.machines {
        if let Some(test) = &machine.last_test {
            println!("  {}: failover last tested at {test}", machine.name);
        }
    }
    println!();
}

fn print_groups(role: &RoleStatus) {
    if role.groups.is_empty() {
        return;
    }
    let moment = |moment: &Option<GroupMoment>| {
        moment.as_ref().map_or_else(
            || "-".to_owned(),
            |m| format!("{} ({}, {} of {})", m.time, output::ago(Some(m.age_seconds)), m.members, m.machines),
        )
    };
    let waiting = |g: &GroupStatus| match g.waiting {
        0 => "-".to_owned(),
        n => format!("{n} for {}, the oldest {}", g.waiting_for.join(", "), output::seconds(g.waiting_seconds)),
    };
    let row = |g: &GroupStatus| {
        vec![g.name.clone(), g.points.to_string(), moment(&g.newest), moment(&g.newest_full), waiting(g), g.conflicting.to_string()]
    };
    let rows: Vec<Vec<String>> = role.groups.iter().map(row).collect();
    output::table(&["GROUP", "POINTS", "NEWEST", "NEWEST OF ALL", "WAITING", "CONFLICTING"], &rows);
    for group in &role.groups {
        if !group.not_here.is_empty() {
            println!(
                "  {}: not configured here: {}; its points wait in vain, because a group lives on one master target",
                group.name,
                group.not_here.join(", ")
            );
        }
        if let Some(failover) = &group.failover {
            println!("  {}: {failover}", group.name);
        }
    }
}
