"""The ROS 2 node: frames of a topic in, masks out, over `rclpy` or over plain DDS with no ROS installed."""
