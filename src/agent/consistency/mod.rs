//! Takes part in the rounds of a replication group: the connection to the coordinator on 20004.

pub mod member;
