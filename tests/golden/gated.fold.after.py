class GraphModule(torch.nn.Module):
    def forward(self, L_self_modules_query_parameters_weight_: "f32[32, 32]", L_self_modules_query_parameters_bias_: "f32[32]", L_x_: "f32[3, 32]", L_self_modules_key_parameters_weight_: "f32[32, 32]", L_self_modules_key_parameters_bias_: "f32[32]", L_self_modules_value_parameters_weight_: "f32[32, 32]", L_self_modules_value_parameters_bias_: "f32[32]", L_self_modules_gate_parameters_weight_: "f32[64, 32]", L_self_modules_up_parameters_weight_: "f32[64, 32]", L_self_modules_up_parameters_bias_: "f32[64]", L_self_modules_down_parameters_weight_: "f32[32, 64]"):
        l_self_modules_query_parameters_weight_ = L_self_modules_query_parameters_weight_
        l_self_modules_query_parameters_bias_ = L_self_modules_query_parameters_bias_
        l_x_ = L_x_
        l_self_modules_key_parameters_weight_ = L_self_modules_key_parameters_weight_
        l_self_modules_key_parameters_bias_ = L_self_modules_key_parameters_bias_
        l_self_modules_value_parameters_weight_ = L_self_modules_value_parameters_weight_
        l_self_modules_value_parameters_bias_ = L_self_modules_value_parameters_bias_
        l_self_modules_gate_parameters_weight_ = L_self_modules_gate_parameters_weight_
        l_self_modules_up_parameters_weight_ = L_self_modules_up_parameters_weight_
        l_self_modules_up_parameters_bias_ = L_self_modules_up_parameters_bias_
        l_self_modules_down_parameters_weight_ = L_self_modules_down_parameters_weight_

        # File: tests/models/gated.py:19 in forward, code: x = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        pifa_pivot_rows_0: "f32[8, 32]" = self.pifa_pivot_rows_0
        pifa_coefficients_1: "f32[24, 8]" = self.pifa_coefficients_1
        pifa_row_order_2: "i32[32]" = self.pifa_row_order_2
        linear_default: "f32[3, 32]" = torch.ops.pifa.linear.default(l_x_, pifa_pivot_rows_0, pifa_coefficients_1, pifa_row_order_2, l_self_modules_query_parameters_bias_, 1.0);  pifa_pivot_rows_0 = pifa_coefficients_1 = pifa_row_order_2 = l_self_modules_query_parameters_bias_ = None
        pifa_pivot_rows_3: "f32[8, 32]" = self.pifa_pivot_rows_3
        pifa_coefficients_4: "f32[24, 8]" = self.pifa_coefficients_4
        pifa_row_order_5: "i32[32]" = self.pifa_row_order_5
        linear_default_1: "f32[3, 32]" = torch.ops.pifa.linear.default(l_x_, pifa_pivot_rows_3, pifa_coefficients_4, pifa_row_order_5, l_self_modules_key_parameters_bias_, 1.0);  pifa_pivot_rows_3 = pifa_coefficients_4 = pifa_row_order_5 = l_self_modules_key_parameters_bias_ = None
        pifa_pivot_rows_6: "f32[8, 32]" = self.pifa_pivot_rows_6
        pifa_coefficients_7: "f32[24, 8]" = self.pifa_coefficients_7
        pifa_row_order_8: "i32[32]" = self.pifa_row_order_8
        linear_default_2: "f32[3, 32]" = torch.ops.pifa.linear.default(l_x_, pifa_pivot_rows_6, pifa_coefficients_7, pifa_row_order_8, l_self_modules_value_parameters_bias_, 1.0);  pifa_pivot_rows_6 = pifa_coefficients_7 = pifa_row_order_8 = l_self_modules_value_parameters_bias_ = None
        scaled_dot_product_attention: "f32[3, 32]" = torch._C._nn.scaled_dot_product_attention(linear_default, linear_default_1, linear_default_2);  linear_default = linear_default_1 = linear_default_2 = None
        x: "f32[3, 32]" = l_x_ + scaled_dot_product_attention;  l_x_ = scaled_dot_product_attention = None

        # File: tests/models/gated.py:20 in forward, code: return x + self.down(F.silu(self.gate(x)) * self.up(x))
        pifa_pivot_rows_9: "f32[12, 32]" = self.pifa_pivot_rows_9;  pifa_pivot_rows_9 = None
        pifa_coefficients_10: "f32[52, 12]" = self.pifa_coefficients_10;  pifa_coefficients_10 = None
        pifa_row_order_11: "i32[64]" = self.pifa_row_order_11;  pifa_row_order_11 = None
        pifa_row_order_18: "i32[64]" = self.pifa_row_order_18;  pifa_row_order_18 = None
        pifa_pivot_rows_21: "f32[12, 32]" = self.pifa_pivot_rows_21
        pifa_coefficients_22: "f32[52, 12]" = self.pifa_coefficients_22
        pifa_row_order_23: "i32[64]" = self.pifa_row_order_23
        linear_default_3: "f32[3, 64]" = torch.ops.pifa.linear.default(x, pifa_pivot_rows_21, pifa_coefficients_22, pifa_row_order_23, None, 1.0);  pifa_pivot_rows_21 = pifa_coefficients_22 = pifa_row_order_23 = None
        silu: "f32[3, 64]" = torch.nn.functional.silu(linear_default_3);  linear_default_3 = None
        pifa_pivot_rows_12: "f32[12, 32]" = self.pifa_pivot_rows_12;  pifa_pivot_rows_12 = None
        pifa_coefficients_13: "f32[52, 12]" = self.pifa_coefficients_13;  pifa_coefficients_13 = None
        pifa_row_order_14: "i32[64]" = self.pifa_row_order_14;  pifa_row_order_14 = None
        pifa_bias_19: "f32[64]" = self.pifa_bias_19
        pifa_row_order_20: "i32[64]" = self.pifa_row_order_20;  pifa_row_order_20 = None
        pifa_pivot_rows_24: "f32[12, 32]" = self.pifa_pivot_rows_24
        pifa_coefficients_25: "f32[52, 12]" = self.pifa_coefficients_25
        pifa_row_order_26: "i32[64]" = self.pifa_row_order_26
        linear_default_4: "f32[3, 64]" = torch.ops.pifa.linear.default(x, pifa_pivot_rows_24, pifa_coefficients_25, pifa_row_order_26, pifa_bias_19, 1.0);  pifa_pivot_rows_24 = pifa_coefficients_25 = pifa_row_order_26 = pifa_bias_19 = None
        mul: "f32[3, 64]" = silu * linear_default_4;  silu = linear_default_4 = None
        pifa_pivot_rows_15: "f32[12, 64]" = self.pifa_pivot_rows_15;  pifa_pivot_rows_15 = None
        pifa_coefficients_16: "f32[20, 12]" = self.pifa_coefficients_16
        pifa_row_order_17: "i32[32]" = self.pifa_row_order_17
        pifa_pivot_rows_27: "f32[12, 64]" = self.pifa_pivot_rows_27
        linear_default_5: "f32[3, 32]" = torch.ops.pifa.linear.default(mul, pifa_pivot_rows_27, pifa_coefficients_16, pifa_row_order_17, None, 1.0);  mul = pifa_pivot_rows_27 = pifa_coefficients_16 = pifa_row_order_17 = None
        add_1: "f32[3, 32]" = x + linear_default_5;  x = linear_default_5 = None
        return (add_1,)

